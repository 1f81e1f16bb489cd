"""Worker processes: how one is started and ended, and the spare one that has loaded the planner before it is needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path

from planner.service.store import SOLVE
from profiles.interpreter import command, python_path

LINE_BYTES = 64 << 20
LAST_BYTES = 2000


@dataclass(frozen=True, kw_only=True)
class Worker:
    process: Process
    words: Path
    """what it says on standard error"""

    def kill(self) -> None:
        """End it, and what it has started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            return self.words.read_bytes()[-LAST_BYTES:].decode(errors="replace")
        return ""

    async def gone(self) -> int:
        """Its exit status, once it has ended."""
        self.kill()
        self.words.unlink(missing_ok=True)
        return await self.process.wait()


class Processes:
    """Starts workers. To load the planner takes a second, so while nothing is to do one process does it beforehand."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spare: asyncio.Task[Worker] | None = None

    async def take(self, lane: str) -> Worker:
        """A process that waits for its order."""
        if lane == SOLVE and self._spare is not None:
            spare, self._spare = self._spare, None
            worker = await spare
            if worker.process.returncode is None:
                return worker
            await worker.gone()  # killed while it waited
        return await self._start(lane)

    def prepare(self) -> None:
        """There is time to have a spare process ready."""
        if self._spare is None:
            self._spare = asyncio.create_task(self._start(SOLVE))

    async def close(self) -> None:
        """End the spare process."""
        if self._spare is not None:
            await (await self._spare).gone()

    async def _start(self, lane: str) -> Worker:
        words = self._folder / f"worker-{os.urandom(6).hex()}.log"
        with words.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *command("planner.service.worker", lane),
                stdin=PIPE,
                stdout=PIPE,
                stderr=errors,
                env=_environment(),
                limit=LINE_BYTES,
                start_new_session=True,
            )
        return Worker(process=process, words=words)


def _environment() -> dict[str, str]:
    """The service's own, so that workers find these packages; without its token."""
    environment = {name: value for name, value in os.environ.items() if name != "TIGHTFIT_TOKEN"}
    return environment | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
