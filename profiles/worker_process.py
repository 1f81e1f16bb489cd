"""Starts the processes that do one part of profiling, and follows them to their end.

A worker gets its request as JSON on its standard input. It answers with JSON lines: ``{"stage": ..., "done": ...,
"total": ...}`` while it works, and ``{"result": ..., "held_bytes": ...}`` at its end, with the most that it has held.
One that fails answers ``{"failure": ...}``, in words, and ends with the exit code of the error's class.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from tightfit.runtime.common.children import last_words, start
from tightfit.runtime.common.errors import CapError, InfeasibleError, InputError, RunError, TightfitError
from tightfit.runtime.common.option_names import named_as, on_command_line, on_the_command_line
from tightfit.runtime.common.parent import end_with_parent
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.supervision.spare_memory import free_memory

ON_COMMAND_LINE = "on_command_line"
"""key in every request: whether messages spell options as a command line has them"""


def run_worker(
    command: Sequence[str],
    request: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    doing: str,
    predicted_bytes: int,
    instead: str,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
) -> Any:
    """The result of a worker process. `doing` is what it does, such as "measuring", `predicted_bytes` what it will hold
    at most, and `instead` what to do where that is not free.

    `on_message` is called with each of its messages but the result. Raises InputError at once where it has no place in
    the memory that is free; InputError, InfeasibleError, RunError or CapError with the worker's words; RunError if it
    was killed or ended otherwise.
    """
    check_place(doing, predicted_bytes, instead)
    with MEMORY_OF_WORKERS.worker(predicted_bytes) as held:
        return _run_worker(command, request, environment, doing, instead, on_message, held)


def _run_worker(
    command: Sequence[str],
    request: Mapping[str, Any],
    environment: Mapping[str, str],
    doing: str,
    instead: str,
    on_message: Callable[[dict[str, Any]], None],
    held: Callable[[int], None],
) -> Any:
    # stderr goes into a file: nobody reads a pipe while results come in, and a full pipe would block the process for
    # ever.
    with (
        tempfile.TemporaryFile() as stderr,
        start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, environment=environment) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            # If the process has ended already, its stderr says why.
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps({**request, ON_COMMAND_LINE: on_the_command_line()}).encode())
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            result = failure = None
            for line in child.stdout:
                message = json.loads(line)
                if "result" in message:
                    result = message["result"]
                    held(message["held_bytes"])
                elif "failure" in message:
                    failure = message["failure"]
                else:
                    on_message(message)
            status = child.wait()
        except BaseException:
            child.kill()
            raise
        if result is not None:
            return result
        said = last_words(stderr, f"exit status {status}")
    for error_class in (InputError, InfeasibleError, RunError, CapError):
        if status == error_class.exit_code and failure:
            raise error_class(failure)
    if status == -signal.SIGKILL:
        raise RunError(f"{doing} was killed, most likely for want of memory; {instead}")
    raise RunError(f"{doing} stopped: {said}")


class _MemoryOfWorkers:
    """What the workers of this process were predicted to hold, and have held, those that run at the same time
    together.
    """

    def __init__(self) -> None:
        self.predicted_bytes = self.held_bytes = 0
        self.own_bytes = 0
        """the most that this process itself was to hold beside them"""
        self._lock = threading.Lock()
        self._running: list[int] = []
        self._held_together = 0
        """by those that have ended while others went on"""

    @contextlib.contextmanager
    def worker(self, predicted_bytes: int) -> Iterator[Callable[[int], None]]:
        """While a worker runs; gives what is told how much it has held."""
        with self._lock:
            self._running.append(predicted_bytes)
            self.predicted_bytes = max(self.predicted_bytes, sum(self._running))
        try:
            yield self._held
        finally:
            with self._lock:
                self._running.remove(predicted_bytes)
                if not self._running:
                    self._held_together = 0

    def _held(self, held_bytes: int) -> None:
        with self._lock:
            self._held_together += held_bytes
            self.held_bytes = max(self.held_bytes, self._held_together)


MEMORY_OF_WORKERS = _MemoryOfWorkers()


def check_place(doing: str, needed_bytes: int, instead: str) -> None:
    """Raise InputError where what is to be done takes more memory than is free; `instead`: what to do then."""
    try:
        free, source = free_memory(unmapped=True)
    except InputError:  # the kernel does not say: it may be tried
        return
    if needed_bytes > free:
        raise InputError(f"{doing} takes {format_size(needed_bytes)}, and {source}; {instead}")


def expect(doing: str, added_bytes: int, instead: str) -> None:
    """Note that this process itself is going to hold `added_bytes` more than now, at most. Raises InputError as
    `check_place`.
    """
    check_place(doing, added_bytes, instead)
    own_bytes = memory().resident + added_bytes
    MEMORY_OF_WORKERS.own_bytes = max(MEMORY_OF_WORKERS.own_bytes, own_bytes)


def have_place(needed_bytes: int, given: int | None) -> bool:
    """Whether workers that hold so much together have a place in the memory that is free, and beside this process in
    what is `given`.
    """
    try:
        free, _ = free_memory(unmapped=True)
    except InputError:
        return False
    return needed_bytes <= free and (given is None or memory().resident + needed_bytes <= given)


def predicted_bytes() -> int:
    """The most bytes that this process and its workers were predicted to hold at once; 0 where nothing was."""
    workers = MEMORY_OF_WORKERS.predicted_bytes
    return max(MEMORY_OF_WORKERS.own_bytes, memory().peak if workers else 0) + workers


def held_bytes() -> int:
    """The most bytes that workers of this process have held at once, with what they have started."""
    return MEMORY_OF_WORKERS.held_bytes


def work(do: Callable[[dict[str, Any], Progress], Any]) -> int:
    """A worker's whole life: reads the request, does the work and sends its result; returns the exit code."""
    end_with_parent(signal.SIGKILL)

    def report(stage: str, done: int, total: int) -> None:
        send(stage=stage, done=done, total=total)

    request = json.load(sys.stdin)
    try:
        with named_as(on_command_line) if request.pop(ON_COMMAND_LINE) else nullcontext():
            send(result=do(request, report), held_bytes=memory().peak)
        return 0
    except TightfitError as error:
        send(failure=str(error))
        return error.exit_code


def send(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
