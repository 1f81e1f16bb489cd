"""The lean process as its parent sees it: started under the plan's cap, heard, and its end told in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from planner.schema import Plan
from profiles import cold
from profiles.errors import CapError, InputError, RunError, TightfitError
from profiles.files import in_memory
from profiles.units import format_size
from runtime.cgroup import MemoryCgroup
from runtime.checkpoint import find_checkpoints
from runtime.job import Job
from runtime.output import writing_to
from runtime.process import child_environment, command
from runtime.report import Observed

ERRORS: dict[str, type[TightfitError]] = {"InputError": InputError, "RunError": RunError, "CapError": CapError}


class LeanProcess:
    """One under way. What it has told so far is `observed`."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        group: MemoryCgroup | None,
        process: subprocess.Popen[bytes],
        read: int,
        words: IO[bytes],
    ) -> None:
        self.plan = plan
        self.directory = directory
        self.group = group
        self.process = process
        self.observed = Observed()
        self._read = read
        self._words = words
        self._buffer = b""
        self._lines: deque[bytes] = deque()

    @property
    def enforced_by(self) -> str:
        return "cgroup" if self.group else "meter"

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it tells from now on, until it has ended; whoever is interrupted may go on with another iterator."""
        while True:
            while self._lines:
                message: dict[str, Any] = json.loads(self._lines.popleft())
                self.observed.take(message)
                yield message
            data = os.read(self._read, 1 << 16)
            if not data:
                return
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            self._lines.extend(lines)

    def stop(self) -> None:
        """Have it finish its step, save and end, and wait for that."""
        self.process.terminate()
        for _ in self.messages():  # a full pipe would hold it up
            pass
        self.process.wait()

    def end(self) -> Observed:
        """All that it told, once it has ended. Raises what its end means."""
        for _ in self.messages():
            pass
        code = self.process.wait()
        self._words.seek(0)
        last = self._words.read().decode(errors="replace").strip().splitlines()
        if self.group:
            self.observed.cgroup_peak_bytes = self.group.peak_bytes()
        self._raise_for(code, last)
        return self.observed

    def _raise_for(self, code: int, last: list[str]) -> None:
        observed = self.observed
        if observed.error:
            raise ERRORS.get(observed.error["kind"], RunError)(observed.error["message"])
        if observed.interrupted and not observed.interrupted["checkpoint"]:
            raise RunError("interrupted before the first step; start again")
        if observed.interrupted:
            raise RunError(
                f"interrupted after step {observed.interrupted['step']}; everything is saved in {observed.interrupted['checkpoint']}, continue with --resume"
            )
        if code == 0:
            return
        checkpoints = find_checkpoints(str(self.directory))
        saved = (
            f"the last checkpoint is {checkpoints[-1][1]}, continue with --resume"
            if checkpoints
            else "no checkpoint was saved yet, start again with --overwrite"
        )
        if code == -signal.SIGKILL and self.group and self.group.oom_kills():
            way = "profile again on this machine and plan anew"
            if in_memory(self.directory):
                way = f"{self.directory} lies in memory (tmpfs), where all that a run writes counts against the cap: choose an output directory on a disk; or else {way}"
            peak = max((observed.peak_bytes, observed.cgroup_peak_bytes or 0))
            raise CapError(
                f"the kernel ended the run at its cap of {format_size(self.plan.budget_bytes)}: the process had reached {format_size(peak)}, "
                f"predicted were {format_size(self.plan.peak_bytes)}; {way}; {saved}"
            )
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        words = f": {last[-1]}" if last else ""
        raise RunError(f"the training process {how}{words}; {saved}")


@contextmanager
def started(
    plan: Plan, job: Job, directory: Path, lock: int, *, cgroup: bool, requests: int | None = None
) -> Iterator[LeanProcess]:
    """The process that carries `job` out in `directory`, which `lock` keeps others out of. `requests` is a descriptor that it reads.

    What ends this does not end the process.
    """
    path = directory / "job"
    try:
        with writing_to(directory):
            job.write(str(path))
        group = MemoryCgroup.create(plan.budget_bytes) if cgroup else None
        try:
            read, write = os.pipe()
            try:
                with tempfile.TemporaryFile() as words:
                    arguments = command(str(path), "--messages", str(write))
                    try:
                        process = subprocess.Popen(
                            group.enter(arguments) if group else arguments,
                            # Orphaned, it still saves: the directory stays locked until it has.
                            pass_fds=(write, lock, *([] if requests is None else [requests])),
                            stdin=subprocess.DEVNULL,
                            stdout=words,
                            stderr=words,
                            env=child_environment(plan.device.threads)
                            | ({} if plan.device.floor.tables_on_disk else {cold.VARIABLE: ""}),
                            start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on
                        )
                    finally:
                        os.close(write)
                    yield LeanProcess(plan, directory, group, process, read, words)
            finally:
                os.close(read)
        finally:
            if group:
                group.remove()
    finally:
        path.unlink(missing_ok=True)
