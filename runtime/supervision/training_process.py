"""Starts the training process under the plan's cap, reads its messages, and turns its end into a result or an
exception.

The standard library only: the supervisor of a run, which counts against the budget, uses this.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.children import start
from tightfit.runtime.common.errors import CapError, InputError, RunError, TightfitError
from tightfit.runtime.common.files import in_memory, nameless_file
from tightfit.runtime.common.option_names import on_the_command_line, spelled
from tightfit.runtime.common.run_folder import find_checkpoints, writing_to
from tightfit.runtime.common.units import format_size
from tightfit.runtime.supervision.cgroup import MemoryCgroup
from tightfit.runtime.supervision.report import ObservedRun

ERRORS: dict[str, type[TightfitError]] = {"InputError": InputError, "RunError": RunError, "CapError": CapError}


@dataclass(frozen=True, kw_only=True)
class RunOrder:
    """A run that is ready to start: what its training process is started with, and the plan's figures for the
    report.
    """

    directory: str
    """output directory of the run"""
    lock: int
    """descriptor of `directory` that holds the lock on it; the training process inherits it"""
    environment: dict[str, str]
    """environment variables of the training process"""
    planned: dict[str, Any]
    """what `tightfit.runtime.session.settings.planned_figures` returns"""
    cgroup: bool
    """whether to have the kernel enforce the cap, if a memory cgroup can be made"""
    steps: int | None = None
    """steps of the run in all; None: its program says when it ends"""
    epoch_steps: float | None = None
    """steps of an epoch; None: the data have no end"""
    finished: dict[str, Any] | None = None
    """the earlier report, if all steps were taken by an earlier run and only an evaluation is missing"""
    evaluates: bool = False
    """whether it takes no step, but evaluates once or answers; its directory is then a temporary one"""
    module: str = "tightfit.runtime.engine.training.child"
    """the module that the process runs which is held to the cap"""
    called: str = "training process"
    """what messages call that process"""
    anew: str = "profile again on this machine and plan anew"
    """what to do if it takes more memory than predicted"""

    @property
    def job(self) -> str:
        """Path of the job (`tightfit.runtime.engine.training.job`)."""
        return os.path.join(self.directory, "job")

    @property
    def cap_bytes(self) -> int:
        """Bytes that the training process may hold: the budget less the supervisor's share."""
        cap: int = self.planned["budget_bytes"] - self.planned["supervisor_bytes"]
        return cap

    def write(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    @classmethod
    def read(cls, path: str) -> Self:
        with open(path, encoding="utf-8") as file:
            return cls(**json.load(file))


def command(*arguments: str, module: str = RunOrder.module) -> list[str]:
    """The command line of a process that is held to the cap; `module` is what it runs, by default a training
    process.
    """
    return interpreter.command(module, *arguments)


class TrainingProcess:
    """A training process that was started. `observed` collects what its messages said so far."""

    def __init__(
        self,
        order: RunOrder,
        group: MemoryCgroup | None,
        process: subprocess.Popen[bytes],
        read: int,
        words: IO[bytes],
        others_bytes: int = 0,
    ) -> None:
        """`others_bytes`: bytes of the budget for processes outside `group`"""
        self.order = order
        self.group = group
        self.others_bytes = others_bytes
        self.process = process
        self.observed = ObservedRun()
        self._read = read
        self._words = words
        self._buffer = b""
        self._lines: deque[bytes] = deque()

    @property
    def enforced_by(self) -> str:
        return "cgroup" if self.group else "meter"

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield its messages until it has ended. After an interruption another iterator goes on where this one
        stopped.
        """
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
        """Have it finish its step, save a checkpoint and end; returns when it has."""
        self.process.terminate()
        for _ in self.messages():  # keep reading: it would block on a full pipe
            pass
        self.process.wait()

    def end(self) -> ObservedRun:
        """Wait for its end; returns what its messages said. Raises CapError, RunError or InputError if it failed."""
        for _ in self.messages():
            pass
        code = self.process.wait()
        self._words.seek(0)
        output_lines = self._words.read().decode(errors="replace").strip().splitlines()
        if self.group:
            self.observed.cgroup_peak_bytes = self.group.peak_bytes()
        self._raise_for(code, output_lines)
        return self.observed

    def _raise_for(self, code: int, output_lines: list[str]) -> None:
        observed = self.observed
        if observed.error:
            raise ERRORS.get(observed.error["kind"], RunError)(observed.error["message"])
        if observed.interrupted and not observed.interrupted["checkpoint"]:
            raise RunError(f"interrupted{'' if self.order.evaluates else ' before the first step'}; start again")
        if observed.interrupted:
            raise RunError(
                f"interrupted after step {observed.interrupted['step']}; everything is saved in"
                f" {observed.interrupted['checkpoint']}, continue with {spelled('resume', True)}"
            )
        if code == 0:
            return
        checkpoints = find_checkpoints(self.order.directory)
        saved = (
            f"the last checkpoint is {checkpoints[-1][1]}, continue with {spelled('resume', True)}"
            if checkpoints
            else f"no checkpoint was saved yet, start again with {spelled('overwrite', True)}"
        )
        if self.order.evaluates:
            saved = "start again"
        if code == -signal.SIGKILL and self.group and self.group.oom_kills():
            advice = self.order.anew
            if in_memory(Path(self.order.directory)):
                advice = (
                    f"{self.order.directory} lies in memory (tmpfs), where all that a run writes counts against the"
                    f" cap: choose an output directory on a disk; or else {advice}"
                )
            planned = self.order.planned
            peak = max((observed.peak_bytes, observed.cgroup_peak_bytes or 0))
            limit, predicted = (planned[name] - self.others_bytes for name in ("budget_bytes", "peak_bytes"))
            raise CapError(
                f"the kernel ended the run at its cap of {format_size(limit)}: it had reached {format_size(peak)}, the"
                f" {self.order.called} by itself {format_size(observed.peak_bytes)} when it last told, predicted were"
                f" {format_size(predicted)}; {advice}; {saved}"
            )
        ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        last_line = f": {output_lines[-1]}" if output_lines else ""
        raise RunError(f"the {self.order.called} {ending}{last_line}; {saved}")


@contextmanager
def started(
    order: RunOrder, *, requests: int | None = None, group: MemoryCgroup | None = None
) -> Iterator[TrainingProcess]:
    """Start the training process of `order`, whose job file is written; on exit the job file and its cgroup are
    removed.

    `requests` is a descriptor from which it reads a Session's requests. `group` is a cgroup, limited to the whole
    budget, that this process is in already; without one, a cgroup for the training process alone is made, if the order
    asks for it and it can be. Leaving the block does not end the process. Raises RunError if the directory cannot be
    written.
    """
    own_group = MemoryCgroup.create(order.cap_bytes) if order.cgroup and group is None else None
    try:
        read, write = os.pipe()
        try:
            with writing_to(order.directory):
                output = os.fdopen(nameless_file(order.directory), "w+b")
            with output:
                arguments = command(order.job, "--messages", str(write), module=order.module)
                if requests is not None and order.module != RunOrder.module:
                    arguments += ["--requests", str(requests)]
                if on_the_command_line():
                    arguments.append("--on-command-line")
                try:
                    process = start(
                        own_group.enter(arguments) if own_group else arguments,
                        # It inherits the lock: if this process is killed, the directory stays locked until it has
                        # saved.
                        pass_fds=(write, order.lock, *([] if requests is None else [requests])),
                        stdout=output,
                        stderr=output,
                        environment=order.environment,
                        start_new_session=True,  # so that Ctrl-C reaches the parent alone, which passes it on
                    )
                finally:
                    os.close(write)
                others_bytes = order.planned["supervisor_bytes"] if own_group else 0
                yield TrainingProcess(order, own_group or group, process, read, output, others_bytes)
        finally:
            os.close(read)
    finally:
        if own_group:
            own_group.remove()
        Path(order.job).unlink(missing_ok=True)
