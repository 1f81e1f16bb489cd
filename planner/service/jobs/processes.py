"""Starts and ends worker processes, and keeps a spare one that has loaded the planner before it is needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.wire.errors import ServiceError, StorageError
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interpreter import command, python_path

LINE_BYTES = 64 << 20
LAST_BYTES = 2000
log = logging.getLogger("tightfit.service")


@dataclass(frozen=True, kw_only=True)
class Worker:
    process: Process
    stderr_file: Path
    """file with what it writes on standard error"""

    def kill(self) -> None:
        """End it, and what it has started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def last_stderr(self) -> str:
        with contextlib.suppress(OSError):
            return self.stderr_file.read_bytes()[-LAST_BYTES:].decode(errors="replace")
        return ""

    async def carry_out(
        self, order: JobOrder, progress: Callable[[dict[str, Any]], None] = lambda event: None
    ) -> dict[str, Any] | None:
        """Send it an order and pass its progress on. Returns its final message; None where the process died without
        one.
        """
        orders, events = self.process.stdin, self.process.stdout
        assert orders is not None
        assert events is not None
        with contextlib.suppress(OSError):
            orders.write(json.dumps(asdict(order)).encode() + b"\n")
            await orders.drain()
        async for line in events:
            event: dict[str, Any] = json.loads(line)
            if event.pop("event") != "progress":
                return event
            progress(event)
        return None

    async def end(self) -> int:
        """Kill it, remove its file, and return its exit status."""
        self.kill()
        self.stderr_file.unlink(missing_ok=True)
        return await self.process.wait()


class WorkerProcesses:
    """Starts workers. Loading the planner takes a second, so a lane has a spare process that has done it already."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder, self._cache = folder, cache
        self._spare: dict[str, asyncio.Future[Worker]] = {}

    async def take(self, lane: str) -> Worker:
        """A process that waits for its order."""
        spare = self._spare.pop(lane, None)
        if spare is not None:
            worker = await spare
            if worker.process.returncode is None:
                return worker
            await worker.end()  # killed while it waited
        return await self._start(lane)

    def prepare(self, lane: str) -> None:
        """Start a spare process of a lane, now that there is time for it."""
        if lane not in self._spare:
            self._spare[lane] = asyncio.create_task(self._start(lane))

    async def give_back(self, lane: str, worker: Worker) -> None:
        """Keep a worker that can take another order as the lane's spare process, or end it where there is one."""
        if lane in self._spare:
            await worker.end()
        else:
            self._spare[lane] = asyncio.get_running_loop().create_future()
            self._spare[lane].set_result(worker)

    async def ask(self, lane: str, order: JobOrder, seconds: float) -> tuple[dict[str, Any] | None, str]:
        """Have a process carry out an order, and keep it for the next one. Returns its final message, None where it
        died without one, and its last words on standard error. Raises TimeoutError after so many seconds.
        """
        worker, end = await self.take(lane), None
        try:
            async with asyncio.timeout(seconds):
                end = await worker.carry_out(order)
            return end, worker.last_stderr()
        finally:
            await (self.give_back(lane, worker) if end is not None else worker.end())

    async def close(self) -> None:
        """End the spare processes."""
        for spare in self._spare.values():
            await (await spare).end()

    async def _start(self, lane: str) -> Worker:
        stderr_file = self._folder / f"worker-{os.urandom(6).hex()}.log"
        with stderr_file.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *command("tightfit.planner.service.jobs.worker", lane),
                stdin=PIPE,
                stdout=PIPE,
                stderr=errors,
                env=_environment(self._cache),
                limit=LINE_BYTES,
                start_new_session=True,
            )
        return Worker(process=process, stderr_file=stderr_file)


def failure(what: str, end: dict[str, Any] | None, last_stderr: str, too_much: ServiceError, folder: Path) -> Exception:
    """Why a process ended without a result, `too_much` where it died. `folder` is where it writes."""
    if end is None or end["code"] == "worker_died":
        log.warning("%s was too much for its process", what, extra={"said": last_stderr})
        return too_much
    if end["code"] == "storage":
        return StorageError(f"{folder}: {end['message']}; free disk space and ask again")
    if end["code"] == "internal":
        log.error("%s failed inside", what, extra={"said": last_stderr})
        return ServiceError(500, "internal", "internal error; the service's log tells more")
    if "refusal" in end:  # of what was sent
        return ServiceError(end["status"], end["refusal"], end["message"], end["field"] or "body")
    return InputError(end["message"])


def _environment(cache: Path) -> dict[str, str]:
    """The service's own, so that workers find these packages; without its token, and with its own cache folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TIGHTFIT_TOKEN"}
    return environment | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "TIGHTFIT_CACHE": str(cache)}
