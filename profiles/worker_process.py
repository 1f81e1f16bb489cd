"""Starts the processes that do one part of profiling, and follows them to their end.

A worker gets its request as JSON on its standard input. It answers with JSON lines: ``{"stage": ..., "done": ..., "total": ...}``
while it works, and ``{"result": ..., "held_bytes": ...}`` at its end, with the most that it has held. One that fails writes a sentence to its standard error and ends with the exit code
of the error's class.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import IO, Any

from tightfit.runtime.common.errors import InfeasibleError, InputError, RunError, TightfitError
from tightfit.runtime.common.option_names import named_as, on_command_line, on_the_command_line
from tightfit.runtime.common.parent import end_with_parent
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.supervision.spare_memory import free_memory

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)"""

STDERR_BYTES = 1 << 16
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
    """The result of a worker process. `doing` is what it does, such as "measuring", `predicted_bytes` what it will hold at most, and
    `instead` what to do where that is not free.

    `on_message` is called with each of its messages but the result. Raises InputError at once where it has no place in the memory that
    is free; InputError, InfeasibleError or RunError with the worker's sentence; RunError if it was killed or ended otherwise.
    """
    global _held_bytes  # noqa: PLW0603  of this process, as its own peak is
    check_place(doing, predicted_bytes, instead)
    # stderr goes into a file: nobody reads a pipe while results come in, and a full pipe would block the process for
    # ever.
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=dict(environment)
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            # If the process has ended already, its stderr says why.
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps({**request, ON_COMMAND_LINE: on_the_command_line()}))
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            result = None
            for line in child.stdout:
                message = json.loads(line)
                if "result" in message:
                    result = message["result"]
                    _held_bytes = max(_held_bytes, message["held_bytes"])
                else:
                    on_message(message)
            status = child.wait()
        except BaseException:
            child.kill()
            raise
        if result is not None:
            return result
        last_line = _last_line(stderr)
    for error_class in (InputError, InfeasibleError, RunError):
        if status == error_class.exit_code and last_line:
            raise error_class(last_line)
    if status == -signal.SIGKILL:
        raise RunError(f"{doing} was killed, most likely for want of memory; {instead}")
    raise RunError(f"{doing} stopped: {last_line or f'exit status {status}'}")


def check_place(doing: str, needed_bytes: int, instead: str) -> None:
    """Raise InputError where what a worker is to do takes more memory than is free, and note what it takes."""
    global _worker_bytes  # noqa: PLW0603  as `_held_bytes`
    _refuse_without_place(doing, needed_bytes, instead)
    _worker_bytes = max(_worker_bytes, needed_bytes)


def expect(doing: str, added_bytes: int, instead: str) -> None:
    """Note that this process itself is going to hold `added_bytes` more than now, at most. Raises InputError as `check_place`."""
    global _own_bytes  # noqa: PLW0603  as `_held_bytes`
    _refuse_without_place(doing, added_bytes, instead)
    _own_bytes = max(_own_bytes, memory().resident + added_bytes)


def _refuse_without_place(doing: str, needed_bytes: int, instead: str) -> None:
    try:
        free, source = free_memory(unmapped=True)
    except InputError:  # the kernel does not say: it may be tried
        return
    if needed_bytes > free:
        raise InputError(f"{doing} takes {format_size(needed_bytes)}, and {source}; {instead}")


_held_bytes = _worker_bytes = _own_bytes = 0


def predicted_bytes() -> int:
    """The most bytes that this process and one of its workers were predicted to hold; 0 where nothing was."""
    return max(_own_bytes, memory().peak if _worker_bytes else 0) + _worker_bytes


def held_bytes() -> int:
    """The most bytes that a worker of this process has held, with what it has started."""
    return _held_bytes


def _last_line(stderr: IO[bytes]) -> str:
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - STDERR_BYTES))
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


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
        failure = error
    sys.stderr.write(f"{failure}\n")
    return failure.exit_code


def send(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
