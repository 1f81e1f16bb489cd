"""Runs through the service: one at a time on the device, gone on with after kill -9, saved when cancelled."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import sqlite3
import sys
import tarfile
import threading
import time

import pytest
from damage import MEASURED
from places import SOURCES
from served import PATIENCE, Served

from tightfit.planner.service.client import connect
from tightfit.planner.service.jobs.work.run import BEFORE, TRAINING, RunClock, _run_to_end, _wait_for_orphan
from tightfit.runtime.common.errors import RunError


def steps_of(service, run):
    return service.http.get(f"/v1/runs/{run}/metrics").json()["steps"]


def wait_for_steps(service, run, count):
    until = time.monotonic() + PATIENCE
    while len(steps := steps_of(service, run)) < count:
        job = service.http.get(f"/v1/jobs/{run}").json()
        assert time.monotonic() < until, job
        assert job["state"] in {"queued", "running"}, job
        time.sleep(0.1)
    return steps


@pytest.mark.slow
def test_runs_follow_each_other_survive_and_save(tmp_path, work, measured):
    shutil.copytree(measured, tmp_path / "data")
    service = Served(tmp_path / "data", "--root", str(work)).start()
    try:
        made = service.result("/v1/profiles", **MEASURED)["profile"]
        # What a run reads lies in the service's own cache, where it is counted.
        (cached,) = service.http.get(f"/v1/profiles/{made}").json()["summary"]["cached"]
        assert service.http.get(f"/v1/profiles/{made}/file").json()["model"]["store"] == cached
        plan = service.result("/v1/plans", profile=made, memory="1GiB", policy="keep-all")["plan"]
        answer = service.http.post("/v1/runs", json={"plan": plan, "data": str(tmp_path), "steps": 1})
        assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, "body.data")

        asked = {"profile": made, "memory": ["4GiB"], "policies": ["keep-all"], "devices": ["phone"]}
        (cell,) = service.result("/v1/comparisons", **asked)["cells"]
        answer = service.http.post("/v1/runs", json={"plan": cell["plan"], "data": "data.jsonl", "steps": 1})
        assert answer.status_code == 422
        assert "with estimated times; plan for this machine" in answer.json()["error"]["message"]

        def ask(key, steps):
            body = {"plan": plan, "data": "data.jsonl", "steps": steps, "checkpoint_every": 20}
            return service.http.post("/v1/runs", json=body, headers={"Idempotency-Key": key}).json()["id"]

        first, second = ask("first", 1_000_000), ask("second", 8)
        assert ask("first", 1_000_000) == first
        # Whoever listens is told of every step: its loss, its seconds, what it holds.
        with connect(service.url) as client:
            told = next(data for name, data in client.events(first) if "step" in data)
        assert set(told) >= {"stage", "step", "loss", "seconds", "resident_bytes", "peak_bytes"}
        wait_for_steps(service, first, 45)
        service.kill()
        service.start()
        before = wait_for_steps(service, first, 1)[-1]["step"]
        steps = wait_for_steps(service, first, before + 30)
        job = service.http.get(f"/v1/jobs/{first}").json()
        assert (job["state"], job["attempts"]) == ("running", 2)
        # It went on from a checkpoint: every step once, none anew from the start.
        assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
        assert service.http.get(f"/v1/runs/{first}/report").status_code == 409

        service.http.post(f"/v1/jobs/{first}/cancel")
        assert service.wait(service.http.get(f"/v1/jobs/{first}").json())["state"] == "cancelled"
        out = service.data / "runs" / first / "out"
        saved = max(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))
        assert saved == steps_of(service, first)[-1]["step"]
        # What it has saved counts among what is kept, and is removed with it.
        with contextlib.closing(sqlite3.connect(service.data / "service.sqlite")) as database:
            ((kept,),) = database.execute("SELECT stored_bytes FROM files WHERE kind = 'folder' AND id = ?", (first,))
        assert kept == sum(path.stat().st_size for path in out.parent.rglob("*") if path.is_file())

        ended = service.wait(service.http.get(f"/v1/jobs/{second}").json())
        assert (ended["state"], ended["result"]["report"]["steps"]) == ("succeeded", 8), ended
        report = service.http.get(f"/v1/runs/{second}/report").json()
        assert 0 < report["peak_bytes"]["measured"] <= report["budget_bytes"]
        assert len(report["loss"]) == len(steps_of(service, second)) == 8
        adapter = service.http.get(f"/v1/runs/{second}/adapter").content
        with tarfile.open(fileobj=io.BytesIO(adapter)) as archive:
            config = json.load(archive.extractfile("adapter/adapter_config.json"))
        assert (config["r"], config["base_model_name_or_path"]) == (4, "model")
        # Nothing that leaves the service tells where things lie on its machine; a client may upload a profile again.
        told = service.http.get(f"/v1/plans/{plan}/file")
        assert report["plan_fingerprint"] == told.json()["fingerprint"]
        with connect(service.url) as client:
            assert client.upload(client.profile(**MEASURED)) == made
            assert client.stored_plan(plan).model.source == "model"
        for path in (
            "jobs",
            f"jobs/{second}",
            f"profiles/{made}",
            f"profiles/{made}/file",
            f"plans/{plan}",
            f"plans/{plan}/view",
        ):
            told_there = service.http.get(f"/v1/{path}").text
            assert str(tmp_path.parent.parent) not in told_there, path
        for text in (told.text, json.dumps(report), adapter.decode(errors="replace")):
            assert str(tmp_path.parent.parent) not in text
        assert not (service.data / "runs" / second / "out").exists()

        # What was cancelled goes on from what it has saved; what is done has nothing to go on with.
        assert service.http.post(f"/v1/runs/{second}/resume").status_code == 409
        answer = service.http.post(f"/v1/runs/{first}/resume")
        assert (answer.status_code, answer.json()["state"]) == (202, "queued")
        steps = wait_for_steps(service, first, saved + 10)
        assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
        service.http.post(f"/v1/jobs/{first}/cancel")
        assert service.wait(service.http.get(f"/v1/jobs/{first}").json())["state"] == "cancelled"
    finally:
        service.stop()


@pytest.mark.slow
def test_a_model_of_the_hub_is_downloaded_and_measured(tmp_path, work, measured):
    """The hub's library is a stand-in that finds the model in a folder; everything else is as it is."""
    told = tmp_path / "asked"
    (tmp_path / "huggingface_hub.py").write_text(
        "from pathlib import Path\n"
        "def snapshot_download(name, allow_patterns):\n"
        f"    Path({str(told)!r}).write_text(name)\n"
        f"    return {str(work / 'model')!r}\n"
    )
    shutil.copytree(measured / "cache", tmp_path / "data" / "cache")
    environment = {"PYTHONPATH": f"{SOURCES}{os.pathsep}{tmp_path}"}
    service = Served(tmp_path / "data", "--hub", environment=environment).start()
    try:
        asked = {name: value for name, value in MEASURED.items() if name != "path"}
        made = service.result("/v1/profiles", hub="org/model", **asked)["profile"]
        assert told.read_text() == "org/model"
        plan = service.result("/v1/plans", profile=made, memory="1GiB", policy="keep-all")
        assert plan["summary"]["status"] == "feasible"
    finally:
        service.stop()


def test_a_run_that_ignores_ctrl_c_is_asked_to_end(tmp_path, monkeypatch):
    ignoring = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))  # closed: the run is cancelled
    with (tmp_path / "lock").open("w") as lock:
        code, _, _ = _run_to_end([sys.executable, "-c", ignoring], lock.fileno(), tmp_path, events=None)
    assert code == -signal.SIGTERM


def test_a_run_waits_for_what_a_killed_attempt_still_saves(tmp_path):
    orphan = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(orphan, fcntl.LOCK_EX)
    asked, service = os.pipe()
    waiting = threading.Thread(target=_wait_for_orphan, args=(tmp_path, asked))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    os.close(orphan)
    waiting.join(PATIENCE)
    assert not waiting.is_alive()
    _wait_for_orphan(tmp_path / "a first attempt has no folder", asked)
    os.close(asked)
    os.close(service)


def test_a_run_that_waits_can_be_cancelled(tmp_path):
    orphan = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(orphan, fcntl.LOCK_EX)
    asked, service = os.pipe()
    threading.Timer(0.3, os.close, (service,)).start()
    with pytest.raises(RunError, match="ended while it waited"):
        _wait_for_orphan(tmp_path, asked)
    os.close(asked)
    os.close(orphan)


def test_whoever_begins_to_look_learns_how_fast_it_goes():
    now = 100.0
    clock = RunClock(lambda: now)
    assert clock.at(BEFORE) == {"at": 100.0, "began": 100.0, "evaluation_seconds": None, "others_cores": 0.0}
    now = 160.0
    assert clock.at(BEFORE)["began"] == 100.0
    clock.hear(
        "other programs use 1.4 of the cores: the last 3 steps took 3 s each where 1 s are expected, and so on\n"
    )
    now = 164.0
    told = clock.at(TRAINING, {"seconds": 3.0})
    assert told == {"at": 164.0, "began": 164.0, "evaluation_seconds": 61.0, "others_cores": 1.4}
    clock.hear("the cores are free again: a step takes 1.000 s\n")
    assert clock.at("evaluating after")["others_cores"] == 0.0
    assert clock.at("evaluating after")["evaluation_seconds"] == 61.0
