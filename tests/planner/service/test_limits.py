"""What a service allows itself and its jobs: how many at once, how long, how much memory, what is kept and for how
long.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
from damage import CONFIG, fill, small_disk
from places import ROOT
from pydantic import ValidationError
from served import service
from synthetic import decoder_like, small_chain

from tightfit.planner.plan import minimum_budget
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.service.jobs import supervisor
from tightfit.planner.service.jobs.store import ATTEMPTS, JobStore
from tightfit.planner.service.jobs.supervisor import Supervisor, cpu_seconds
from tightfit.planner.service.jobs.work.keeping import keep_profile
from tightfit.planner.service.jobs.work.upload import check_size
from tightfit.planner.service.wire.errors import ServiceError, StorageError
from tightfit.planner.service.wire.events import Events
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.schema import PLAN_JOB, ServiceJob
from tightfit.planner.service.wire.settings import Settings
from tightfit.profiles.io import canonical_json
from tightfit.profiles.schema import Profile

PATIENCE = 60.0
"""seconds"""


@pytest.fixture(scope="module")
def profile():
    return small_chain(3, layers=3)


@pytest.fixture(scope="module")
def minimum(profile):
    return minimum_budget(profile)


def upload(http, profile):
    answer = http.post("/v1/uploads/profile", json=profile.model_dump(mode="json"))
    assert answer.status_code in {200, 201}, answer.text
    return answer.json()["id"]


def wait(http, job, until=("succeeded", "failed")):
    patience = time.monotonic() + PATIENCE
    while (told := http.get(f"/v1/jobs/{job['id']}").json())["state"] not in until:
        assert time.monotonic() < patience, told
        time.sleep(0.05)
    return told


def endless(http, number, headers=None):
    """A comparison that takes minutes, another for each number."""
    budgets = [f"{1000 + 8 * step + number}MiB" for step in range(64)]
    asked = {"profile": upload(http, decoder_like(24)), "memory": budgets}
    return http.post("/v1/comparisons", json=asked, headers=headers)


def test_jobs_wait_for_a_worker_and_as_many_as_may(tmp_path):
    with service(tmp_path, workers=1, waiting=1) as http:
        first = endless(http, 0).json()
        wait(http, first, until=("running",))
        second = endless(http, 1).json()
        assert http.get(f"/v1/jobs/{second['id']}").json()["state"] == "queued"
        full = endless(http, 2)
        assert (full.status_code, full.headers["retry-after"]) == (429, "30")
        http.post(f"/v1/jobs/{first['id']}/cancel")
        wait(http, second, until=("running",))


def test_what_a_client_says_of_itself_changes_nothing(tmp_path):
    """Three names filled the queue of all, and the key of one blocked that of another: there is one user."""
    with service(tmp_path, workers=1, waiting=2) as http:
        wait(http, endless(http, 0).json(), until=("running",))
        names = [{"Client-Id": name, "X-Forwarded-For": f"10.0.0.{len(name)}"} for name in ("a", "bb", "ccc")]
        first, second = (endless(http, number, names[number]).json() for number in (1, 2))
        full = endless(http, 3)
        assert (full.status_code, full.json()["error"]["message"]) == (
            429,
            "2 jobs are waiting already; ask again in a minute",
        )
        assert "wanted_by" not in first
        # Whoever asked for it, a job ends when it is ended, and asking for the same joined it until then.
        assert endless(http, 1, names[2]).json()["id"] == first["id"]
        cancel = f"/v1/jobs/{first['id']}/cancel"
        assert http.post(cancel, headers=names[0]).json()["state"] == "cancelled"
        assert http.post(cancel).status_code == 409
        assert http.get(f"/v1/jobs/{second['id']}").json()["state"] == "queued"


def test_a_profile_that_was_uploaded_can_be_run_once_it_is_measured_here(tmp_path, profile, minimum):
    measured = profile.model_copy(update={"device": profile.device.model_copy(update={"measured": True})})
    with service(tmp_path) as http:
        identity = upload(http, measured)
        plan = wait(http, http.post("/v1/plans", json={"profile": identity, "memory": "1GiB"}).json())["result"]["plan"]
        run = {"plan": plan, "data": "random", "steps": 1}
        assert "was not made by this service" in http.post("/v1/runs", json=run).json()["error"]["message"]
        own = http.app.state.service
        job = own.store.enqueue("profile", "cpu", {}, content=None, key=None, waiting=9)[0]
        made = keep_profile(own.objects, measured, origin="made")
        own.store.finish(job.id, "succeeded", result={"profile": made["id"]}, files=[made])
        assert http.get(f"/v1/profiles/{identity}").json()["origin"] == "made"
        assert upload(http, measured) == identity  # which takes nothing away
        assert http.post("/v1/runs", json=run).status_code == 202


@pytest.mark.slow
def test_an_upload_does_not_block_the_run_of_what_was_measured(tmp_path, profile):
    """Copies of a measured profile that lead to the same plan, planned before it and with other options."""
    measured = profile.model_copy(update={"device": profile.device.model_copy(update={"measured": True})})
    clipping = chosen(profile, None, 3.0)
    changed = measured.model_copy(update={"optimizer": clipping.optimizer, "tensors": clipping.tensors})
    with service(tmp_path) as http:
        own = http.app.state.service

        def planned(identity, **options):
            asked = {
                "profile": identity,
                "memory": "1GiB",
                "policy": "keep-all",
                "optimizer": "adamw",
                "max_grad_norm": 1.0,
            } | options
            result = wait(http, http.post("/v1/plans", json=asked).json())["result"]
            return result["plan"], result["summary"]["fingerprint"]

        copy = upload(http, changed)
        made = own.store.add(keep_profile(own.objects, measured, origin="made"))["id"]
        assert copy != made
        plans = [planned(one, **options) for one in (copy, made) for options in ({}, {"gap": 0.1})]
        assert len({fingerprint for _, fingerprint in plans}) == 1
        assert len({plan for plan, _ in plans}) == 4
        for plan, _ in plans:
            run = http.post("/v1/runs", json={"plan": plan, "data": "random", "steps": 1})
            assert run.status_code == (422 if http.get(f"/v1/plans/{plan}").json()["profile"] == copy else 202)
            if run.status_code == 202:
                http.post(f"/v1/jobs/{run.json()['id']}/cancel")


@pytest.mark.slow
def test_jobs_end_one_after_the_other_when_their_time_is_over(tmp_path):
    with service(tmp_path, workers=1, job_seconds=1.0) as http:
        first, second = (endless(http, number).json() for number in range(2))
        for job in (first, second):
            ended = wait(http, job)
            assert (ended["state"], ended["error"]["code"]) == ("failed", "too_slow")
            assert ended["error"]["message"] == "the job took longer than 1 s; set a smaller time_limit"
        begun = http.get(f"/v1/jobs/{second['id']}").json()["started"]
        assert begun >= http.get(f"/v1/jobs/{first['id']}").json()["finished"]


def test_a_job_gets_the_processor_for_as_long_as_its_time_limit_says(tmp_path, monkeypatch):
    """Whatever holds it: a pattern of a stranger, a graph, a library."""
    request = {"memory": [1, 2, 3], "policies": ["solver"], "devices": ["a", "b"], "time_limit": 1.5}
    assert cpu_seconds(request) == supervisor.READING_SECONDS + 18
    assert cpu_seconds({"memory": 1, "time_limit": 1.5}) == supervisor.READING_SECONDS + 3
    assert cpu_seconds({"data": "x"}) is None
    monkeypatch.setattr(supervisor, "cpu_seconds", lambda request: 2)
    with service(tmp_path) as http:
        ended = wait(http, endless(http, 1).json())
        assert (ended["state"], ended["error"]["code"]) == ("failed", "too_slow")
        assert ended["error"]["message"].startswith("the job took more than the 2 s of the processor that its time_lim")


def test_a_solve_over_its_memory_fails_alone(tmp_path):
    with service(tmp_path, solve_bytes=40 << 20) as http:
        large = upload(http, decoder_like(24))
        ended = wait(http, http.post("/v1/plans", json={"profile": large, "memory": "150MiB"}).json())
        assert (ended["state"], ended["error"]["code"]) == ("failed", "worker_died"), ended
        assert "40 MiB" in ended["error"]["message"]
        assert http.get("/healthz").status_code == 200


@pytest.mark.slow
def test_an_upload_over_its_memory_or_its_time_fails_alone(tmp_path, profile):
    for limits, told in (
        ({"check_bytes": 128 << 20}, "the upload takes more than 128 MiB of memory to read; send a smaller profile"),
        ({"check_seconds": 0.01}, "the upload took longer to read than 0.01 s; send a smaller profile"),
    ):
        with service(tmp_path, **limits) as http:
            large = decoder_like(24).model_dump(mode="json")
            large["tensors"] += [large["tensors"][0] | {"name": f"t{number}"} for number in range(50_000)]
            answer = http.post("/v1/uploads/profile", json=large)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
            assert answer.json()["error"]["message"] == told
            assert http.get("/healthz").status_code == 200
            if "check_bytes" in limits:
                upload(http, profile)
            assert [path.name for path in (tmp_path / "data" / "objects" / "tmp").glob("upload-*")] == []


def test_more_uploads_than_can_be_read_are_told_to_come_later(tmp_path, profile, monkeypatch):
    """Slow bodies hold no place that others wait for; whole ones that wait, and their bytes, are bounded."""
    with service(tmp_path) as http:
        for limit, told in (
            ("MOST_UNREAD", "0 uploads wait to be read"),
            ("BYTES_UNDER_WAY", "0 MiB are being uploaded"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(f"tightfit.planner.service.http.uploads.{limit}", 0)
                answer = http.post("/v1/uploads/profile", json=profile.model_dump(mode="json"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "busy")
            assert answer.json()["error"]["message"] == f"{told} already; ask again in a minute"
        upload(http, profile)
        uploads = http.app.state.service.uploads
        assert (uploads._bytes, uploads._unread) == (0, 0)


def test_what_is_here_already_is_known_without_being_read_again(tmp_path, profile, monkeypatch):
    with service(tmp_path) as http:
        identity = upload(http, profile)
        monkeypatch.setattr("tightfit.planner.service.jobs.processes.WorkerProcesses.take", None)
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        body = gzip.compress(canonical_json(profile).encode())
        answer = http.post("/v1/uploads/profile", content=body, headers=headers)
        assert (answer.status_code, answer.json()["id"]) == (200, identity)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": 4}, None),
        ({"layers": 5}, "the profile has 5 layers; this service plans at most 4 operators"),
        ({"layers": 2, "operators": 2}, None),
        ({"layers": 2, "operators": 3}, "the profile unrolls to 6 operators; this service plans at most 4"),
        ({"operators": 5}, "the profile unrolls to 5 operators"),  # of a program that no layer runs, too
        ({"layers": 2, "values": 2, "tensors": 2}, None),
        ({"layers": 2, "values": 2, "tensors": 3}, "the profile unrolls to 7 tensors; this service plans at most 6"),
        ({"graph": 4}, None),
        ({"graph": 5}, "the profile unrolls to 5 operators"),
        ({"depth": 62}, None),
        ({"depth": 63}, "more than 64 deep in each other"),
    ],
)
def test_a_graph_is_counted_before_it_is_made(change, told):
    program = {"name": "p", "operators": [{}] * change.get("operators", 0), "values": [{}] * change.get("values", 0)}
    data = {
        "layers": [{"program": "p"}] * change.get("layers", 0),
        "programs": [program, 3],
        "tensors": [{}] * change.get("tensors", 0),
        "operators": [{}] * change.get("graph", 0),
        "config": json.loads("[" * change.get("depth", 0) + "]" * change.get("depth", 0) or "0"),
    }
    data["config"] = [data["config"]]
    with pytest.raises(ServiceError, match=told) if told else contextlib.nullcontext():
        check_size(data, steps=4, tensors=6)
    # What is no profile at all is for those to tell who read it as one.
    for other in ([], 3, None, {"layers": 3, "programs": {"a": 1}}, {"layers": [3], "programs": [{"name": []}]}):
        check_size(other, steps=0, tensors=0)


def test_of_a_list_s_faults_the_first_is_told(profile):
    wrong = profile.model_dump(mode="json") | {"layers": [{}] * 1000, "tensors": [{"name": 3}] * 1000}
    with pytest.raises(ValidationError) as caught:
        Profile.model_validate(wrong)
    assert {error["loc"][:2] for error in caught.value.errors()} == {("tensors", 0), ("layers", 0)}


@pytest.mark.slow
def test_what_is_too_old_or_too_much_goes_when_the_service_starts(tmp_path, profile, minimum):
    with service(tmp_path) as http:
        identity = upload(http, profile)
        job = http.post("/v1/plans", json={"profile": identity, "memory": minimum}).json()
        plan = wait(http, job)["result"]["plan"]
    with service(tmp_path) as http:
        assert http.get(f"/v1/plans/{plan}").status_code == 200
        assert http.get(f"/v1/jobs/{job['id']}").json()["state"] == "succeeded"
    with service(tmp_path, keep_bytes=1) as http:
        for path in (f"plans/{plan}", f"profiles/{identity}", f"jobs/{job['id']}"):
            assert http.get(f"/v1/{path}").status_code == 404, path
        assert http.post("/v1/plans", json={"profile": identity, "memory": minimum}).status_code == 404
    assert [path for path in (tmp_path / "data" / "objects").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_packed_weights_and_configs_are_kept_no_longer_than_the_rest(tmp_path):
    """What measurements and runs leave behind lies in the service's own cache, and counts."""
    cache = tmp_path / "data" / "cache"
    files = [cache / name for name in ("stores/a.store", "profiles/b.json", "configs/c/config.json")]
    halves = [
        cache / name for name in ("stores/.a.store.1.partial", "configs/c/.config.json.1.part", "measure-1.store")
    ]
    for path in (*files, *halves):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    (cache / "native").mkdir()
    (cache / "native" / "unpack.so").touch()

    def counted(http):
        http.app.state.service.supervisor.retain()
        return http.app.state.service.store.stored_bytes()

    with service(tmp_path) as http:
        assert counted(http) == 3000
        assert not any(path.exists() for path in halves)
        files[0].unlink()
        assert counted(http) == 2000
        later = cache / "stores" / "d.store"
        later.write_bytes(bytes(1000))
        store = http.app.state.service.store
        run, _ = store.enqueue("run", "cpu", {}, content=None, key=None, waiting=9)
        store.next("cpu")
        assert counted(http) == 2000  # it may be at it
        store.finish(run.id, "cancelled")
        assert counted(http) == 3000
    with service(tmp_path, keep_bytes=1500) as http:
        assert counted(http) == 1000
        assert later.exists()
    with service(tmp_path, keep_bytes=1) as http:
        assert counted(http) == 0
        assert [path for path in cache.rglob("*") if path.is_file()] == [cache / "native" / "unpack.so"]
        assert list((cache / "configs").iterdir()) == []


def test_a_run_keeps_the_packed_weights_that_it_needs(tmp_path, profile):
    with service(tmp_path, roots=(tmp_path,)) as http:
        own = http.app.state.service
        measured = profile.model_copy(update={"device": profile.device.model_copy(update={"measured": True})})
        row = keep_profile(own.objects, measured, origin="made", cached=["stores/a.store"])
        made = own.store.add(row)["id"]
        plan = wait(http, http.post("/v1/plans", json={"profile": made, "memory": "1GiB"}).json())["result"]["plan"]
        run = http.post("/v1/runs", json={"plan": plan, "data": "random", "steps": 1}).json()
        needed = own.store._rows("SELECT kind, file FROM uses WHERE job = ?", run["id"])
        assert {"kind": "cache", "file": "stores/a.store"} in needed
        assert ("cache", "stores/a.store") in own.store._touched


def test_a_profile_can_be_measured_anew(tmp_path):
    """A request with `force` is a job of its own, whose worker is told so; the profile that is there answers the
    others.
    """
    with service(tmp_path) as http:
        asked, store = {"config": CONFIG, "seq": 16}, http.app.state.service.store

        def finish(job, digit):  # in the service's own thread, which alone uses the database
            http.portal.call(partial(store.finish, job["id"], "succeeded", result={"profile": digit * 64}))

        first = http.post("/v1/profiles", json=asked).json()
        assert "force" not in first["request"]
        finish(first, "0")
        assert http.post("/v1/profiles", json=asked).json()["id"] == first["id"]
        anew = http.post("/v1/profiles", json=asked | {"force": True})
        assert (anew.status_code, anew.json()["request"]["force"]) == (202, True)
        assert anew.json()["id"] != first["id"]
        assert http.post("/v1/profiles", json=asked | {"force": True}).json()["id"] == anew.json()["id"]
        finish(anew.json(), "1")
        again = http.post("/v1/profiles", json=asked).json()
        assert again["id"] not in {first["id"], anew.json()["id"]}


@pytest.mark.slow
def test_a_service_on_a_full_disk_says_so_when_it_is_started(tmp_path):
    """No traceback: the exit code of what fails while running, the file, and what to do. With room it starts again."""
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        with service(disk) as http:
            upload(http, small_chain(3, layers=2))
        filler = fill(disk, 0)
        words = [
            sys.executable,
            "-m",
            "tightfit.runtime.cli.main",
            "serve",
            "--port",
            "0",
            "--data-dir",
            str(disk / "data"),
        ]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 4, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"tightfit: {disk / 'data' / 'service.sqlite'}: ")
        assert last.endswith("; free disk space and try again")
        assert "Traceback" not in done.stderr
        filler.unlink()
        with service(disk) as http:
            assert len(http.get("/v1/profiles").json()["items"]) == 1


def test_an_error_tells_no_path_of_the_server(tmp_path):
    root = tmp_path / "root"
    (root / "llama").mkdir(parents=True)
    (root / "llama" / "config.json").write_text("{")
    with service(tmp_path, roots=(root,)) as http:
        job = wait(http, http.post("/v1/profiles", json={"path": "llama"}).json())
        assert (job["request"]["source"], job["error"]["code"]) == ("llama", "input")
        assert job["error"]["message"].startswith("llama/config.json: not JSON (")
        with http.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
            told = events.read().decode()
        assert str(tmp_path) not in told
        assert str(tmp_path) not in http.get("/v1/jobs").text
        # The worker has had the whole path.
        assert http.app.state.service.store.job(job["id"]).request["source"] == str(root / "llama")


@pytest.mark.slow
def test_a_full_disk_is_told_and_costs_no_job(tmp_path, profile, minimum, monkeypatch, caplog):
    monkeypatch.setattr("tightfit.planner.service.jobs.supervisor.DISK_SECONDS", 0.1)
    with service(tmp_path) as http:
        database = http.app.state.service.store._database
        identity = upload(http, profile)
        for memory in range(minimum, minimum + 100):
            job = http.post("/v1/plans", json={"profile": identity, "memory": memory}).json()
            database.execute("PRAGMA max_page_count = 1")  # SQLite takes as many as there are
            if http.get(f"/v1/jobs/{job['id']}").json()["state"] != "succeeded":
                break
            database.execute("PRAGMA max_page_count = 1000000")  # this one was planned and written down before
        other = small_chain(4).model_dump(mode="json")
        other["model"]["name"] = "long " * 20_000
        refusal = http.post("/v1/uploads/profile", json=other)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (507, "storage")
        assert refusal.json()["error"]["message"].startswith(
            "service.sqlite: database or disk is full; free disk space"
        )
        # A plan that cannot be written down is written down once there is room, and the next is planned.
        patience = time.monotonic() + PATIENCE
        while "not stored; tried again until it is" not in caplog.messages:
            assert time.monotonic() < patience
            time.sleep(0.05)
        time.sleep(0.5)
        assert http.get(f"/v1/jobs/{job['id']}").json()["state"] == "running"
        database.execute("PRAGMA max_page_count = 1000000")
        assert wait(http, job)["state"] == "succeeded"
        again = http.post("/v1/plans", json={"profile": identity, "memory": minimum + 4096}).json()
        assert wait(http, again)["state"] == "succeeded"


@pytest.mark.slow
def test_a_disk_without_room_for_what_a_worker_has_made_costs_no_job(tmp_path, profile, minimum, monkeypatch, caplog):
    monkeypatch.setattr("tightfit.planner.service.jobs.supervisor.DISK_SECONDS", 0.1)
    with service(tmp_path) as http:
        identity = upload(http, profile)
        folders = [tmp_path / "data" / "objects" / f"{number:02x}" for number in range(256)]
        taken = [folder for folder in folders if not folder.exists()]
        for folder in taken:
            folder.touch()  # no plan's folder can be made
        patience = time.monotonic() + PATIENCE
        for memory in range(minimum, minimum + 4):
            job = http.post("/v1/plans", json={"profile": identity, "memory": memory}).json()
            state = "queued"
            while state != "succeeded" and caplog.messages.count("not stored; tried again until it is") < 2:
                assert time.monotonic() < patience
                time.sleep(0.05)
                state = http.get(f"/v1/jobs/{job['id']}").json()["state"]
            if state != "succeeded":  # one plan in 256 belongs into the folder that is there, beside the profile
                break
        assert state in {"queued", "running"}
        for folder in taken:
            folder.unlink()
        assert wait(http, job)["state"] == "succeeded"


@pytest.mark.slow
def test_a_run_goes_on_only_with_data_under_the_roots_of_today(tmp_path, profile):
    (tmp_path / "root").mkdir()
    data = tmp_path / "root" / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    with service(tmp_path, roots=(tmp_path / "root",)) as http:
        own = http.app.state.service
        measured = profile.model_copy(update={"device": profile.device.model_copy(update={"measured": True})})
        made = own.store.add(keep_profile(own.objects, measured, origin="made"))["id"]
        plan = wait(http, http.post("/v1/plans", json={"profile": made, "memory": "1GiB"}).json())["result"]["plan"]
        led = tmp_path / "root" / "led"
        led.mkdir()
        (led / "a.jsonl").symlink_to("/etc/passwd")
        for field in ("data", "eval_data"):
            answer = http.post("/v1/runs", json={"plan": plan, "data": str(data), "steps": 1} | {field: "led"})
            assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, f"body.{field}")
        run = http.post("/v1/runs", json={"plan": plan, "data": str(data), "steps": 1}).json()
        assert wait(http, run)["state"] == "failed"  # nothing is there to train
    with service(tmp_path) as http:
        answer = http.post(f"/v1/runs/{run['id']}/resume")
        assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, "body.data")
        assert http.get(f"/v1/jobs/{run['id']}").json()["state"] == "failed"


@pytest.fixture
def full(tmp_path, monkeypatch):
    """A supervisor and a run of its that is running, on a disk that is full until `full.room` is set."""
    monkeypatch.setattr("tightfit.planner.service.jobs.supervisor.DISK_SECONDS", 0.01)
    settings = Settings(data_dir=tmp_path, command=())
    objects, events = ObjectStore(tmp_path / "objects"), Events()
    store = JobStore(tmp_path / "s.sqlite", objects)
    supervisor = Supervisor(settings, store, objects, events)
    supervisor._wake["cpu"] = asyncio.Event()
    supervisor.room = False
    finish = store.finish

    def finish_with_room(*words, **more):
        if not supervisor.room:
            raise StorageError("full")
        return finish(*words, **more)

    monkeypatch.setattr(store, "finish", finish_with_room)
    job, _ = store.enqueue("run", "cpu", {}, content=None, key=None, waiting=9)
    yield supervisor, store, job
    store.close()


FAILED = {"event": "error", "code": "run_failed", "message": "no"}


def test_a_run_that_is_cancelled_while_its_end_waits_for_room_can_go_on(full):
    supervisor, store, job = full

    async def end():
        store.next("cpu")
        ending = asyncio.create_task(supervisor._conclude(job, FAILED, 1, None))
        await asyncio.sleep(0.05)
        supervisor.cancel(job.id)
        supervisor.room = True
        await ending

    asyncio.run(end())
    assert store.job(job.id).state == "cancelled"
    assert supervisor.resume(job.id).state == "queued"
    assert supervisor._cancelled == set()  # else it would be ended as soon as it starts


@pytest.mark.parametrize(
    ("told", "code", "before", "state", "attempts", "said"),
    [
        ({"event": "done", "result": {"a": 1}, "files": []}, 0, "cancelled", "succeeded", 1, None),
        (FAILED, 0, None, "failed", 1, "run_failed"),
        (FAILED, 0, "cancelled", "cancelled", 1, None),
        (FAILED, 0, "stopping", "queued", 0, None),
        (FAILED | {"code": "storage"}, 0, None, "queued", 0, None),
        (None, -signal.SIGKILL, None, "queued", 1, None),
        (None, -signal.SIGKILL, "cancelled", "cancelled", 1, None),
        (None, -signal.SIGKILL, "the last attempt", "failed", ATTEMPTS, "worker_died"),
        (None, -signal.SIGSEGV, None, "failed", 1, "worker_died"),
    ],
)
def test_what_becomes_of_a_job_follows_from_its_end(full, told, code, before, state, attempts, said):
    supervisor, store, _ = full
    supervisor.room = True
    for _ in range(ATTEMPTS - 1 if before == "the last attempt" else 0):
        store.requeue(store.next("cpu").id, counted=True)
    job = store.next("cpu")
    if before == "cancelled":
        supervisor._cancelled.add(job.id)
    supervisor._stopping = before == "stopping"
    ended = supervisor._write_end(job, told, code, SimpleNamespace(last_stderr=lambda: "its last words"))
    assert (ended.state, ended.attempts, ended.error and ended.error.code) == (state, attempts, said)


def test_a_service_that_stops_on_a_full_disk_leaves_the_job_to_the_next_start(full, monkeypatch):
    supervisor, store, _ = full
    failed = []

    async def carry_out(job, lane):
        supervisor._stopping = True
        try:
            await supervisor._conclude(job, {"result": {}, "files": []}, 0, None)
        finally:
            supervisor.room = True  # enough for a few words

    monkeypatch.setattr(supervisor, "_carry_out", carry_out)
    monkeypatch.setattr(supervisor, "_announce", failed.append)
    with pytest.raises(StorageError):
        asyncio.run(supervisor._serve("cpu"))
    assert failed == []
    assert store.recover() == (1, 0)


def test_who_starts_to_listen_hears_the_end():
    """The job is read once its events are heard: an end in between would be waited for for ever."""
    events = Events()
    done = ServiceJob.model_validate(PLAN_JOB)

    def read(identity):
        assert (identity, events.listeners) == (done.id, 1)
        return done

    async def listen():
        return [event async for event in events.stream(done.id, read)]

    (only,) = asyncio.run(asyncio.wait_for(listen(), 5))
    assert json.loads(only.partition("data: ")[2])["state"] == "succeeded"
    assert events.listeners == 0
