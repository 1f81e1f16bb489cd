"""Kills a service and its workers again and again while clients send requests, then checks every acknowledged job."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import httpx
from served import PATIENCE


def workers_of(pid):
    """Process ids of the workers that the service `pid` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def kill_again_and_again(service, profile, budgets, *, rounds, seed=0, clients=4, per_client=3):
    """Kill (SIGKILL) `rounds` times, alternately the service, which is then restarted, and one of its workers.

    Returns a dict with `acknowledged` (job id -> final job), `lost` (acknowledged ids that nobody knows any more) and
    `kills`.
    """
    rng = random.Random(seed)
    identity = service.upload(profile)
    acknowledged: set[str] = set()
    supply = iter(budgets)
    lock = threading.Lock()
    kills = {"service": 0, "worker": 0}

    def ask():
        with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as http:
            for _ in range(per_client):
                with lock:
                    budget = next(supply)
                try:
                    answer = http.post("/v1/plans", json={"profile": identity, "memory": budget})
                except httpx.TransportError:
                    return  # never acknowledged, so the service owes nothing
                assert answer.status_code in {200, 202}, answer.text
                with lock:
                    acknowledged.add(answer.json()["id"])

    for number in range(rounds):
        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.05, 1.0))
        running = workers_of(service.process.pid)
        if number % 2:
            running = running or _some_worker(service)
            with contextlib.suppress(ProcessLookupError):  # the worker may have ended by itself
                os.kill(rng.choice(running), signal.SIGKILL)
                kills["worker"] += 1
        else:
            service.kill()
            kills["service"] += 1
        for thread in threads:
            thread.join()
        if service.process.poll() is not None:
            service.start()
            # Workers must end with their service.
            assert not [pid for pid in running if not _gone(pid)]
    finished, lost = {}, []
    for job in sorted(acknowledged):
        answer = service.http.get(f"/v1/jobs/{job}")
        if answer.status_code == 404:
            lost.append(job)
        else:
            finished[job] = service.wait(answer.json(), patience=PATIENCE * rounds)
    return {"acknowledged": finished, "lost": lost, "kills": kills}


def _some_worker(service):
    """The service's workers, waiting until it has at least one."""
    until = time.monotonic() + PATIENCE
    while not (found := workers_of(service.process.pid)):
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


def ended(pid):
    """Whether a process has ended. A zombie counts too, since the process that adopted it may never wait for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _gone(pid):
    """Whether a process has ended or ends within 20 seconds."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if ended(pid):
            return True
        time.sleep(0.05)
    return False
