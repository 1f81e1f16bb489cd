"""What a service allows itself and its jobs: how many at once, how long, how much memory, what is kept and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient
from synthetic import decoder_like, small_chain

from planner.plan import minimum_budget
from planner.service.app import create_app
from planner.service.errors import StorageError
from planner.service.events import Events
from planner.service.metrics import Metrics
from planner.service.objects import Objects
from planner.service.schema import PLAN_JOB, Job
from planner.service.settings import Settings
from planner.service.solving import keep_profile
from planner.service.store import ATTEMPTS, Store
from planner.service.supervisor import Supervisor
from profiles.interpreter import command

PATIENCE = 60.0
"""seconds"""
PLANNED = ("tightfit_worker_seconds_count", {"kind": "plan"})
"""how many plans workers have come to the end of, well or not"""


@pytest.fixture(scope="module")
def profile():
    return small_chain(3, layers=3)


@pytest.fixture(scope="module")
def minimum(profile):
    return minimum_budget(profile)


@contextlib.contextmanager
def service(tmp_path, **limits):
    settings = Settings(data_dir=tmp_path / "data", command=tuple(command("runtime.cli")), **limits)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as http:
        yield http


def upload(http, profile):
    answer = http.post("/v1/profiles/upload", json=profile.model_dump(mode="json"))
    assert answer.status_code in {200, 201}, answer.text
    return answer.json()["id"]


def wait(http, job, until=("succeeded", "failed")):
    patience = time.monotonic() + PATIENCE
    while (told := http.get(f"/v1/jobs/{job['id']}").json())["state"] not in until:
        assert time.monotonic() < patience, told
        time.sleep(0.05)
    return told


def endless(http, number):
    """A comparison that takes minutes, another for each number."""
    budgets = [f"{1000 + 8 * step + number}MiB" for step in range(64)]
    return http.post("/v1/comparisons", json={"profile": upload(http, decoder_like(24)), "memory": budgets})


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


def test_jobs_end_one_after_the_other_when_their_time_is_over(tmp_path):
    with service(tmp_path, workers=1, job_seconds=1.0) as http:
        first, second = (endless(http, number).json() for number in range(2))
        for job in (first, second):
            ended = wait(http, job)
            assert (ended["state"], ended["error"]["code"]) == ("failed", "too_slow")
            assert ended["error"]["message"] == "the job took longer than 1 s; set a smaller time_limit"
        begun = http.get(f"/v1/jobs/{second['id']}").json()["started"]
        assert begun >= http.get(f"/v1/jobs/{first['id']}").json()["finished"]


def test_a_solve_over_its_memory_fails_alone(tmp_path):
    with service(tmp_path, solve_bytes=40 << 20) as http:
        large = upload(http, decoder_like(24))
        ended = wait(http, http.post("/v1/plans", json={"profile": large, "memory": "150MiB"}).json())
        assert (ended["state"], ended["error"]["code"]) == ("failed", "worker_died"), ended
        assert "40 MiB" in ended["error"]["message"]
        assert http.get("/healthz").status_code == 200


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


def test_a_full_disk_is_told_and_costs_no_job(tmp_path, profile, minimum, monkeypatch):
    monkeypatch.setattr("planner.service.supervisor.DISK_SECONDS", 0.1)
    with service(tmp_path) as http:
        database = http.app.state.service.store._database
        identity = upload(http, profile)
        registry = http.app.state.service.metrics.registry
        for memory in range(minimum, minimum + 100):
            before = registry.get_sample_value(*PLANNED) or 0
            job = http.post("/v1/plans", json={"profile": identity, "memory": memory}).json()
            database.execute("PRAGMA max_page_count = 1")  # SQLite takes as many as there are
            if http.get(f"/v1/jobs/{job['id']}").json()["state"] != "succeeded":
                break
            database.execute("PRAGMA max_page_count = 1000000")  # this one was planned and written down before
        path = tmp_path / "data" / "service.sqlite"
        other = small_chain(4).model_dump(mode="json")
        other["model"]["name"] = "long " * 20_000
        refusal = http.post("/v1/profiles/upload", json=other)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (507, "storage")
        assert f"{path}: database or disk is full; free disk space" in refusal.json()["error"]["message"]
        # A plan that cannot be written down is written down once there is room, and the next is planned.
        patience = time.monotonic() + PATIENCE
        while (registry.get_sample_value(*PLANNED) or 0) == before:
            assert time.monotonic() < patience
            time.sleep(0.05)
        time.sleep(0.5)
        assert http.get(f"/v1/jobs/{job['id']}").json()["state"] == "running"
        database.execute("PRAGMA max_page_count = 1000000")
        assert wait(http, job)["state"] == "succeeded"
        again = http.post("/v1/plans", json={"profile": identity, "memory": minimum + 4096}).json()
        assert wait(http, again)["state"] == "succeeded"


def test_a_disk_without_room_for_what_a_worker_makes_costs_no_job(tmp_path, profile, minimum, monkeypatch):
    monkeypatch.setattr("planner.service.supervisor.DISK_SECONDS", 0.1)
    with service(tmp_path) as http:
        identity = upload(http, profile)
        folders = [tmp_path / "data" / "objects" / f"{number:02x}" for number in range(256)]
        taken = [folder for folder in folders if not folder.exists()]
        for folder in taken:
            folder.touch()  # no plan's folder can be made
        tries = http.app.state.service.metrics.registry
        patience = time.monotonic() + PATIENCE
        for memory in range(minimum, minimum + 4):
            job = http.post("/v1/plans", json={"profile": identity, "memory": memory}).json()
            state, before = "queued", tries.get_sample_value(*PLANNED) or 0
            while state != "succeeded" and (tries.get_sample_value(*PLANNED) or 0) < before + 2:
                assert time.monotonic() < patience
                time.sleep(0.05)
                state = http.get(f"/v1/jobs/{job['id']}").json()["state"]
            if state != "succeeded":  # one plan in 256 belongs into the folder that is there, beside the profile
                break
        assert state in {"queued", "running"}
        for folder in taken:
            folder.unlink()
        assert wait(http, job)["state"] == "succeeded"


def test_a_run_goes_on_only_with_data_under_the_roots_of_today(tmp_path, profile):
    (tmp_path / "root").mkdir()
    data = tmp_path / "root" / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    with service(tmp_path, roots=(tmp_path / "root",)) as http:
        own = http.app.state.service
        measured = profile.model_copy(update={"device": profile.device.model_copy(update={"measured": True})})
        made = own.store.add(keep_profile(own.objects, measured, origin="made"))["id"]
        plan = wait(http, http.post("/v1/plans", json={"profile": made, "memory": "1GiB"}).json())["result"]["plan"]
        run = http.post("/v1/runs", json={"plan": plan, "data": str(data), "steps": 1}).json()
        assert wait(http, run)["state"] == "failed"  # nothing is there to train
    with service(tmp_path) as http:
        answer = http.post(f"/v1/runs/{run['id']}/resume")
        assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, "body.data")
        assert http.get(f"/v1/jobs/{run['id']}").json()["state"] == "failed"


@pytest.fixture
def full(tmp_path, monkeypatch):
    """A supervisor and a run of its that is running, on a disk that is full until `full.room` is set."""
    monkeypatch.setattr("planner.service.supervisor.DISK_SECONDS", 0.01)
    settings = Settings(data_dir=tmp_path, command=())
    store, events = Store(tmp_path / "s.sqlite"), Events()
    supervisor = Supervisor(settings, store, Objects(tmp_path / "objects"), events, Metrics())
    supervisor._wake["cpu"] = asyncio.Event()
    supervisor.room = False
    finish = store.finish

    def finish_with_room(*words, **more):
        if not supervisor.room:
            raise StorageError("full")
        return finish(*words, **more)

    monkeypatch.setattr(store, "finish", finish_with_room)
    job, _ = store.ask("run", "cpu", {}, content=None, key=None, waiting=9)
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
    ended = supervisor._write_end(job, told, code, SimpleNamespace(last_words=lambda: "its last words"))
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
    monkeypatch.setattr(supervisor, "_ended", failed.append)
    with pytest.raises(StorageError):
        asyncio.run(supervisor._serve("cpu"))
    assert failed == []
    assert store.recover() == (1, 0)


def test_who_starts_to_listen_hears_the_end():
    """The job is read once its events are heard: an end in between would be waited for for ever."""
    events = Events()
    done = Job.model_validate(PLAN_JOB)

    def read(identity):
        assert (identity, events.listeners) == (done.id, 1)
        return done

    async def listen():
        return [event async for event in events.stream(done.id, read)]

    (only,) = asyncio.run(asyncio.wait_for(listen(), 5))
    assert json.loads(only.partition("data: ")[2])["state"] == "succeeded"
    assert events.listeners == 0
