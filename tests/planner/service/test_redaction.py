"""What clients are told of the server's paths."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import PATIENCE, service
from synthetic import small_chain

from tightfit.planner.io import parse_plan
from tightfit.planner.service.jobs.keeping import keep_profile
from tightfit.planner.service.jobs.store import file_row
from tightfit.planner.service.wire.redaction import Redaction, with_paths
from tightfit.planner.service.wire.schema import Error, ServiceJob
from tightfit.profiles.io import parse_profile
from tightfit.profiles.schema import Model


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("/srv/my models/llama/config.json: not JSON (line 1)", "llama/config.json: not JSON (line 1)"),
        ("'/srv/my models/a b.jsonl' is empty; give data", "'a b.jsonl' is empty; give data"),
        ("/srv/my models: no model.safetensors", "my models: no model.safetensors"),
        ("/srv/my models-2/x: denied", "my models-2/x: denied"),
        ("/var/lib/tightfit/data/runs/job-1/out: the disk is full", "runs/job-1/out: the disk is full"),
        ("[Errno 2] No such file or directory: '/usr/lib/python3/x.py'", "[Errno 2] No such file or directory: 'x.py'"),
        ("look into /tmp/a/b.c.", "look into b.c."),
        ("(/home/me/.cache/huggingface)", "(huggingface)"),
        (
            "file:///etc/passwd, see https://pytorch.org/docs/stable",
            "file:///etc/passwd, see https://pytorch.org/docs/stable",
        ),
        ("2.5 MiB/s, read/write, 1 / 2, and/or, n/a", "2.5 MiB/s, read/write, 1 / 2, and/or, n/a"),
        ("org/model: no such directory", "org/model: no such directory"),
    ],
)
def test_paths_are_relative_to_what_is_open_or_names(words, told):
    redaction = Redaction([Path("/srv/my models"), Path("/var/lib/tightfit/data"), Path("/")])
    assert redaction.text(words) == told


def test_a_link_s_target_is_an_open_folder_too(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    redaction = Redaction([tmp_path / "link"])
    assert redaction.text(f"{tmp_path}/real/a.json: damaged") == "a.json: damaged"
    assert redaction.text(f"{tmp_path}/link/a.json: damaged") == "a.json: damaged"


def test_a_job_tells_its_request_and_its_error_so():
    request = {
        "source": "/srv/models/llama",
        "data": "random",
        "seq": 16,
        "eval_data": None,
        "adapter": "/srv/models/a",
    }
    error = Error(code="input", message="/srv/models/llama/config.json: not JSON")
    job = ServiceJob(
        id="job-0123456789abcdef",
        kind="profile",
        state="failed",
        created=0.0,
        attempts=1,
        label="l",
        request=request,
        error=error,
    )
    told = Redaction([Path("/srv/models")]).job(job)
    assert told.request == request | {"source": "llama", "adapter": "a"}
    assert told.error.message == "llama/config.json: not JSON"


FOLDERS = [Path("/srv/my models"), Path("/var/lib/data/cache"), Path("/var/lib/data")]
INSIDE = st.lists(st.from_regex(r"[A-Za-z0-9][\w-]{0,8}", fullmatch=True), min_size=1, max_size=3).map("/".join)
PATHS = st.builds(lambda folder, inside: f"{folder}/{inside}", st.sampled_from([*FOLDERS, Path("/home/me")]), INSIDE)
WORDS = st.sampled_from(["org/model", "samples/s", "", "random"])
DATA = st.recursive(
    PATHS | WORDS | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abc"), inner),
)


@given(DATA)
def test_no_path_is_left_in_json(data):
    told = json.dumps(Redaction(FOLDERS).value(data))
    assert not any(root in told for root in ("/srv", "/var", "/home"))
    assert told.count("org/model") == json.dumps(data).count("org/model")


@given(PATHS | WORDS, st.none() | PATHS, st.none() | PATHS | WORDS)
def test_a_model_is_told_without_paths_and_finds_them_again(source, store, base):
    config = {"layers": 2} | ({} if base is None else {"adapter_base": base})
    model = Model(name="m", source=source, kind="decoder", store=store, config=config)
    told, paths = Redaction(FOLDERS).model(model)
    assert not any(root in told.model_dump_json() for root in ("/srv", "/var", "/home"))
    assert with_paths(told, json.loads(json.dumps(paths))) == model


def adapter(base):
    """A tar file as a run leaves it."""
    made = io.BytesIO()
    config = json.dumps({"r": 4, "base_model_name_or_path": base}).encode()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in (("adapter_config.json", config), ("adapter_model.safetensors", b"\0" * 1000)):
            member = tarfile.TarInfo(f"adapter/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def test_what_older_services_stored_is_redacted_where_it_is_shown(tmp_path):
    """Profiles and plans that were stored as they were, and reports."""
    places = {
        "source": str(tmp_path / "models" / "m"),
        "store": str(tmp_path / "data" / "cache" / "stores" / "m.store"),
    }
    profile = small_chain(3, layers=2)
    config = profile.model.config | {"adapter_base": "/home/me/base"}
    model = profile.model.model_copy(update={**places, "config": config})
    device = profile.device.model_copy(update={"measured": True})
    (tmp_path / "models").mkdir()
    with service(tmp_path, roots=(tmp_path / "models",)) as http:
        own = http.app.state.service
        row = keep_profile(own.objects, profile.model_copy(update={"model": model, "device": device}), origin="made")
        made = own.store.add(row)["id"]
        job = http.post("/v1/plans", json={"profile": made, "memory": "1GiB"}).json()
        until = time.monotonic() + PATIENCE
        while (job := http.get(f"/v1/jobs/{job['id']}").json())["state"] in {"queued", "running"}:
            assert time.monotonic() < until
            time.sleep(0.05)
        plan = job["result"]["plan"]
        run, _ = own.store.enqueue("run", "cpu", {}, content=None, key=None, waiting=9)
        report = own.objects.put(json.dumps({"base": places["source"], "loss": [0.5]}).encode())
        kept = {"report": report, "adapter": own.objects.put(adapter(places["source"]))}
        rows = [file_row(kind, run.id, written, name=kind, summary={}) for kind, written in kept.items()]
        own.store.finish(run.id, "failed", files=rows)
        profile_file, plan_file, report_file = (
            http.get(f"/v1/{path}") for path in (f"profiles/{made}/file", f"plans/{plan}/file", f"runs/{run.id}/report")
        )
        for answer in (profile_file, plan_file, report_file, http.get(f"/v1/plans/{plan}/view")):
            assert answer.status_code == 200
            assert str(tmp_path) not in answer.text
            assert "/home" not in answer.text
        assert parse_profile(profile_file.content, "it").model.source == "m"
        assert parse_plan(plan_file.content, "it").model.store == "stores/m.store"
        assert report_file.json() == {"base": "m", "loss": [0.5]}
        with tarfile.open(fileobj=io.BytesIO(http.get(f"/v1/runs/{run.id}/adapter").content)) as archive:
            told = {member.name: archive.extractfile(member).read() for member in archive}
        assert json.loads(told.pop("adapter/adapter_config.json")) == {"r": 4, "base_model_name_or_path": "m"}
        assert told == {"adapter/adapter_model.safetensors": b"\0" * 1000}
        # Runs of the plan have the real paths.
        assert (
            parse_plan(own.objects.read(own.store.file("plan", plan)["digest"]), "it").model.source == places["source"]
        )
        # What a client uploads is its own.
        theirs = http.post(
            "/v1/profiles/upload", json=profile.model_copy(update={"model": model}).model_dump(mode="json")
        )
        told = http.get(f"/v1/profiles/{theirs.json()['id']}/file")
        assert told.json()["model"]["source"] == places["source"]
