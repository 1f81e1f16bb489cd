"""Entry point of the training process, also called the lean process: runs a job under the cap, or measures the floor.

    python -m tightfit.runtime.engine.training.child JOB --messages FD    runs a job
    python -m tightfit.runtime.engine.training.child --floor              prints what an idle process holds, as JSON

It imports PyTorch's kernels and nothing heavier, loads what stays resident, and repeats the plan's schedule. It sends
JSON lines to its parent on descriptor FD. On SIGINT and SIGTERM it finishes the step, saves a checkpoint and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from functools import partial
from typing import Any

from tightfit.runtime.common.errors import CapError, TightfitError
from tightfit.runtime.common.files import write_all
from tightfit.runtime.common.option_names import in_python, named_as, on_command_line
from tightfit.runtime.common.parent import end_with_parent
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import lean_torch
from tightfit.runtime.engine.start.process import leave


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tightfit.runtime.engine.training.child")
    parser.add_argument("job", nargs="?")
    parser.add_argument("--messages", type=int, default=1)
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--on-command-line", action="store_true", help="messages are for somebody there")
    options = parser.parse_args(arguments)
    if options.floor:
        return _tell_floor()
    stop = _StopRequest()

    def send(event: str, **content: Any) -> None:
        try:
            write_all(options.messages, json.dumps({"event": event, **content}).encode() + b"\n")
        except BrokenPipeError:
            stop()  # the parent has ended: finish the step, save a checkpoint and end too

    try:
        lean_torch.load()
        with named_as(on_command_line if options.on_command_line else in_python):
            return run_job(options.job, send, stop)
    except TightfitError as error:
        code, kind, text = error.exit_code, type(error).__name__, str(error)
    except MemoryError as error:
        code, kind, text = CapError.exit_code, "CapError", f"memory could not be had: {error}"
    except Exception as error:
        import traceback

        traceback.print_exc()
        code, kind, text = 4, "RunError", f"the run failed: {type(error).__name__}: {error}"
    send("error", kind=kind, message=text, peak_bytes=memory().peak)
    return code


def _tell_floor() -> int:
    lean_torch.load()
    from tightfit.runtime.engine.start.floor import measure_floor

    def tell(figures: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()

    measure_floor(tell)
    return 0


def run_job(path: str, send: Any, stop: _StopRequest) -> int:
    from tightfit.runtime.engine.start.kernel_warmup import prepare
    from tightfit.runtime.engine.training.job import Job
    from tightfit.runtime.engine.training.loop import run

    channel = prepare()
    job = Job.read(path)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    parent = os.getppid()
    # If the parent is killed, the kernel sends SIGUSR1, and this process saves and ends. The kernel also sends it when
    # only the parent's thread that started this process ends; then the parent's id is unchanged, and the run goes on.
    signal.signal(signal.SIGUSR1, lambda *_: None if os.getppid() == parent else stop())
    end_with_parent(signal.SIGUSR1)
    return run(job, channel, send, stop.is_set)


class _StopRequest:
    """A signal handler that records that the run is to stop; may also be called directly."""

    def __init__(self) -> None:
        self._set = False

    def __call__(self, number: int | None = None, frame: Any = None) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


if __name__ == "__main__":
    leave(partial(main, sys.argv[1:]))
