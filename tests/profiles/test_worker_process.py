"""Workers that run at the same time count together."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tightfit.profiles import worker_process
from tightfit.profiles.worker_process import have_place, held_bytes, run_worker
from tightfit.runtime.engine.device.resident import memory

MEETING = """
import json, pathlib, sys, time
request = json.load(sys.stdin)
folder = pathlib.Path(request["folder"])
(folder / request["name"]).touch()
while len(list(folder.iterdir())) < request["together"]:
    time.sleep(0.01)
print(json.dumps({"result": request["name"], "held_bytes": request["bytes"]}))
"""
"""a worker that ends once so many have begun"""


@pytest.fixture(autouse=True)
def no_workers_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "MEMORY_OF_WORKERS", type(worker_process.MEMORY_OF_WORKERS)())


def run(folder: Path, name: str, size: int, together: int) -> Any:
    folder.mkdir(exist_ok=True)
    request = {"folder": str(folder), "name": name, "bytes": size, "together": together}
    return run_worker(
        [sys.executable, "-c", MEETING], request, os.environ, doing="meeting", predicted_bytes=2 * size, instead="wait"
    )


def test_workers_one_after_the_other_count_as_the_largest(tmp_path: Path) -> None:
    for number, size in enumerate((3, 5, 4)):
        run(tmp_path / str(number), "one", size, 1)
    assert (held_bytes(), worker_process.MEMORY_OF_WORKERS.predicted_bytes) == (5, 10)


def test_workers_at_the_same_time_count_together(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda name, size: run(tmp_path, name, size, 2), ("one", "other"), (3, 5)))
    assert results == ["one", "other"]
    assert (held_bytes(), worker_process.MEMORY_OF_WORKERS.predicted_bytes) == (8, 16)
    run(tmp_path / "alone", "one", 6, 1)
    assert (held_bytes(), worker_process.MEMORY_OF_WORKERS.predicted_bytes) == (8, 16)


def test_what_is_given_holds_this_process_and_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "free_memory", lambda *, unmapped: (1000, "1000 bytes are free"))
    own = memory().resident
    assert have_place(1000, None)
    assert not have_place(1001, None)
    assert have_place(1000, 2 * own + 1000)
    assert not have_place(1000, own // 2)
