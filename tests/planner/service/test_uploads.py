"""Files of samples that are uploaded: kept under their names, limited, and read by runs."""

from __future__ import annotations

import gzip
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from damage import MEASURED, ROWS, lines
from served import Served, service

from tightfit.planner.service.client import connect
from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.jobs.work.inputs import placed
from tightfit.planner.service.jobs.work.run import _command
from tightfit.runtime.common.errors import InputError

SAMPLES = lines(ROWS).encode()
UNKNOWN = "0" * 64


@pytest.fixture
def http(tmp_path):
    with service(tmp_path, data_bytes=1000) as opened:
        yield opened


def upload(http, name="samples.jsonl", content=SAMPLES, **headers):
    headers = {"Content-Type": "application/octet-stream"} | headers
    return http.post("/v1/uploads/samples", params={"name": name}, content=content, headers=headers)


def message(answer, status, field):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert [fault["field"] for fault in error["fields"]] == [field]
    return error["message"]


def test_an_upload_is_kept_under_its_name_and_listed(http):
    answer = upload(http)
    stored = answer.json()
    assert (answer.status_code, stored["name"], stored["bytes"]) == (201, "samples.jsonl", len(SAMPLES))
    again = upload(http)
    assert (again.status_code, again.json()) == (200, stored)
    other = upload(http, name="held out.jsonl").json()
    assert other["id"] != stored["id"]
    listed = http.get("/v1/uploads").json()
    assert [found["name"] for found in listed["items"]] == ["held out.jsonl", "samples.jsonl"]
    assert [found["id"] for found in http.get("/v1/uploads", params={"search": "held"}).json()["items"]] == [
        other["id"]
    ]


@pytest.mark.slow
def test_a_json_list_becomes_lines_that_a_run_reads(http):
    listed = upload(
        http, name="alpaca.json", content=b"\xef\xbb\xbf " + json.dumps([*ROWS, {"text": "\u00e9"}]).encode()
    )
    assert (listed.status_code, listed.json()["name"]) == (201, "alpaca.jsonl")
    (row,) = http.app.state.service.store.files("upload").items
    content = http.app.state.service.objects.read(row["digest"])
    assert [json.loads(line) for line in content.splitlines()] == [*ROWS, {"text": "\u00e9"}]
    # What has lines already stays as it is, under its name.
    same = upload(http, name="lines.json").json()
    assert (same["name"], same["bytes"]) == ("lines.json", len(SAMPLES))
    half = upload(http, name="half.json", content=b'[{"text": "\\ud800", "n": NaN}]')
    assert (half.status_code, half.json()["name"]) == (201, "half.jsonl")
    assert "bad.json: not JSON, or cut off" in message(upload(http, name="bad.json", content=b"[1, "), 422, "body")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("samples.txt", "'samples.txt' names no file of samples; they end with .jsonl, .jsonl.gz, .csv"),
        ("../samples.jsonl", "pattern"),
        (".samples.jsonl", "pattern"),
        ("a/b.jsonl", "pattern"),
        ("a\nb.jsonl", "pattern"),
        ("", "pattern"),
        ("ü" * 150 + ".jsonl", "at most 200 bytes"),
    ],
)
def test_names_that_are_no_file_of_samples_are_refused(http, name, said):
    assert said in message(upload(http, name=name), 422, "query.name")


def test_what_is_uploaded_is_limited(http):
    assert "more than 1000 bytes" in message(upload(http, content=b"x" * 1001), 413, "body")
    assert "more than 1000 bytes" in message(upload(http, content=iter([b"x" * 600] * 2)), 413, "body")
    assert "the body is empty" in message(upload(http, content=b""), 422, "body")
    assert "send application/octet-stream" in message(
        upload(http, **{"Content-Type": "application/json"}), 415, "header.Content-Type"
    )
    # What takes JSON does not take bytes instead.
    answer = http.post("/v1/plans", content=b"{}", headers={"Content-Type": "application/octet-stream"})
    assert "send application/json" in message(answer, 415, "header.Content-Type")
    assert http.get("/v1/uploads").json()["items"] == []
    assert not list((http.app.state.service.objects.temporary).glob("upload-*"))


def test_an_upload_that_is_not_used_goes_with_age_and_takes_no_run_with_it(http):
    own = http.app.state.service
    stored = upload(http).json()
    run, _ = own.store.enqueue(
        "run",
        "none",
        {"data": f"upload:{stored['id']}"},
        content=None,
        key=None,
        waiting=9,
        uses=[("upload", stored["id"])],
    )
    assert run.label == "a model on samples.jsonl"
    own.store.finish(run.id, "cancelled")
    removed = own.store.expire(before=0.0, keep_bytes=0)
    assert [row["kind"] for row in removed] == ["upload"]
    assert own.store.job(run.id).state == "cancelled"
    assert http.get("/v1/uploads").json()["items"] == []


def test_an_upload_is_deleted_unless_a_job_needs_it(http):
    own = http.app.state.service
    stored, twin = upload(http).json(), upload(http, name="twin.jsonl").json()
    use = [("upload", stored["id"])]
    run, _ = own.store.enqueue("run", "none", {"data": "x"}, content=None, key=None, waiting=9, uses=use)
    answer = http.delete(f"/v1/uploads/{stored['id']}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    own.store.finish(run.id, "failed")
    assert http.delete(f"/v1/uploads/{stored['id']}").status_code == 204
    assert http.delete(f"/v1/uploads/{stored['id']}").status_code == 404
    assert own.store.job(run.id).state == "failed"
    # Two names of one content are two uploads: the content stays as long as one of them does.
    (row,) = own.store.files("upload").items
    assert own.objects.read(row["digest"]) == SAMPLES
    http.delete(f"/v1/uploads/{twin['id']}")
    assert not own.objects.path(row["digest"]).exists()


@pytest.mark.parametrize("rounds", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_uploads_beside_deletes_of_the_same_content_lose_nothing(http, rounds):
    """No upload is refused, and what is listed has its content, whenever nothing is under way."""
    own = http.app.state.service

    def send(numbers):
        for number in numbers:
            answer = upload(http, name=f"{number % 3}.jsonl")
            assert answer.status_code in {200, 201}, answer.text
            if number % 2:
                assert http.delete(f"/v1/uploads/{answer.json()['id']}").status_code in {204, 404}

    with ThreadPoolExecutor(6) as senders:
        for begin in range(0, rounds, 50):
            left = iter(range(begin, begin + 50))
            list(senders.map(send, [left] * 6))
            assert all(own.objects.read(row["digest"]) == SAMPLES for row in own.store.files("upload").items)
    for row in own.store.files("upload").items:
        assert http.delete(f"/v1/uploads/{row['id']}").status_code == 204
    left_files = [path.name for path in own.objects.folder.rglob("*") if path.is_file()]
    assert [name for name in left_files if not name.startswith("worker-")] == []  # but what spare processes say


def order(own, stored, tmp_path, **request):
    row = own.store.file("upload", stored["id"])
    return JobOrder(
        kind="run",
        request={"data": f"upload:{stored['id']}"} | request,
        objects=str(own.objects.folder),
        memory_bytes=None,
        digests={row["id"]: row["digest"]},
        names={row["id"]: row["name"]},
        folder=str(tmp_path / "job"),
        command=["tightfit"],
    )


def test_a_run_reads_a_copy_under_the_name_that_it_was_uploaded_by(http, tmp_path):
    packed = gzip.compress(SAMPLES)
    stored = upload(http, name="samples.jsonl.gz", content=packed).json()
    asked = order(http.app.state.service, stored, tmp_path, eval_data="/held-out.jsonl", steps=3)
    words = _command(asked, tmp_path / "job" / "plan.json", tmp_path / "job" / "out")
    data = words[words.index("--data") + 1]
    assert data.endswith("/samples.jsonl.gz")
    assert data.startswith(str(tmp_path / "job" / "uploads"))
    assert Path(data).read_bytes() == packed
    assert "--eval=/held-out.jsonl" in words
    with pytest.raises(InputError, match=f"the uploaded data {UNKNOWN} are gone"):
        placed(asked, f"upload:{UNKNOWN}", tmp_path)


@pytest.mark.slow
def test_the_client_uploads_and_lists(tmp_path):
    served = Served(tmp_path / "data").start()
    try:
        (tmp_path / "mine & yours.jsonl").write_bytes(SAMPLES)
        with connect(served.url) as client:
            data = client.upload_data(tmp_path / "mine & yours.jsonl")
            assert [(f"upload:{found['id']}", found["name"]) for found in client.items("uploads")] == [
                (data, "mine & yours.jsonl")
            ]
            with pytest.raises(InputError, match="names no file of samples"):
                client.upload_data(tmp_path / "mine & yours.jsonl", name="mine.exe")
            with pytest.raises(InputError, match="No such file"):
                client.upload_data(tmp_path / "none.jsonl")
    finally:
        served.stop()


@pytest.mark.slow
def test_a_model_is_trained_on_uploaded_data(tmp_path, work, measured):
    shutil.copytree(measured, tmp_path / "data")
    served = Served(tmp_path / "data", "--root", str(work)).start()
    try:
        made = served.result("/v1/profiles", **MEASURED)["profile"]
        plan = served.result("/v1/plans", profile=made, memory="1GiB", policy="keep-all")["plan"]
        asked = {"plan": plan, "steps": 2}
        refused = served.http.post("/v1/runs", json=asked | {"data": f"upload:{UNKNOWN}"})
        assert "no upload" in message(refused, 404, "body.data")
        headers = {"Content-Type": "application/octet-stream"}
        params = {"name": "samples.jsonl"}
        stored = served.http.post("/v1/uploads/samples", params=params, content=SAMPLES, headers=headers).json()
        job = served.wait(
            served.ask("/v1/runs", data=f"upload:{stored['id']}", eval_data=f"upload:{stored['id']}", **asked)
        )
        assert job["state"] == "succeeded", job
        same = served.wait(served.ask("/v1/runs", data="data.jsonl", **asked))
        losses = [served.http.get(f"/v1/runs/{run['id']}/report").json()["loss"] for run in (job, same)]
        assert losses[0] == losses[1]
        assert job["label"].endswith("on samples.jsonl in 1024.0 MiB")
        report = json.dumps(served.http.get(f"/v1/runs/{job['id']}/report").json())
        assert str(tmp_path) not in report
        assert not list((served.data / "runs" / job["id"]).rglob("samples.jsonl"))
    finally:
        served.stop()
