"""A worker process, which does one job, or reads uploads or makes views one after the other: ``python -m
tightfit.planner.service.jobs.worker LANE``.

The first line of standard input is a job's `JobOrder`; in the lanes of uploads and views every line is one. Standard
output gets JSON lines: ``progress``, then ``done`` or ``error``. A solve or a measurement has nothing to save and ends
with the service. A run is asked to save and end when standard input closes. A job that dies takes nothing with it but
itself.

A process imports only what its own jobs need (`_work_of`): that of a run lies beside the training, that of an upload
is copied for each, that of views keeps the plans that it has read last.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tightfit.planner.service.jobs.orders import LOCAL, SOLVE, UPLOAD, VIEW, EventWriter, JobOrder
from tightfit.planner.service.wire.errors import JOB_ERRORS, ServiceError, UnreadableError
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.parent import end_with_parent

NICE = 5
"""solving leaves the processor to whoever waits for an answer"""
LOADED = {SOLVE: ("plan", "comparison", "answer-plan"), UPLOAD: ("upload",), VIEW: ("view",)}
"""lane -> the kinds of orders whose work its processes load before one comes"""
FIRST_TO_GO = 500
"""oom_score_adj: where the machine is short of memory, a solve ends before the service does"""


def main(lane: str) -> int:
    events = EventWriter()
    Path("/proc/self/oom_score_adj").write_text(str(FIRST_TO_GO))
    if lane == VIEW:
        end_with_parent(signal.SIGKILL)  # at full speed: somebody waits for the answer
    elif lane != LOCAL:
        _to_the_background()
    # Loaded before the order comes, and before its limit: that is for the work itself.
    for kind in LOADED.get(lane, ()):
        _work_of(kind)
    if lane == UPLOAD:
        return _each_in_a_child(events)
    while line := sys.stdin.buffer.readline():  # until the service has ended and needs nothing
        _carry_out(JobOrder(**json.loads(line)), events)
        if lane != VIEW:
            break
    return 0


def _each_in_a_child(events: EventWriter) -> int:
    """One upload after the other, each in a copy of this process, which has loaded what is needed
    and limits nothing.
    """
    while line := sys.stdin.buffer.readline():
        child = os.fork()
        if not child:
            try:
                end_with_parent(signal.SIGKILL)
                _carry_out(JobOrder(**json.loads(line)), events)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            ending = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
            events.write("error", code="worker_died", message=f"the process of this upload died ({ending})")
    return 0


def _work_of(kind: str) -> Callable[[JobOrder, EventWriter], dict[str, Any]]:
    """What carries out orders of a kind: `do` of the file in `jobs/work` that has its name."""
    module = import_module(f"tightfit.planner.service.jobs.work.{kind.replace('-', '_')}")
    work: Callable[[JobOrder, EventWriter], dict[str, Any]] = module.do
    return work


def _carry_out(order: JobOrder, events: EventWriter) -> None:
    """Carry out an order and report its result or error."""
    events.redaction = order.redaction()
    if order.kind == "profile":
        _to_the_background()
    elif order.kind in {"answer", "merge"}:  # what they start ends with them; they are asked for anew
        end_with_parent(signal.SIGKILL)
    work = _work_of(order.kind)
    if order.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (order.memory_bytes, order.memory_bytes))
    if order.cpu_seconds is not None:
        most, highest = math.ceil(time.process_time()) + order.cpu_seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]
        if highest == resource.RLIM_INFINITY or most < highest:  # the shell's limit may be lower: it ends the job then
            resource.setrlimit(resource.RLIMIT_CPU, (most, highest))
    try:
        result = work(order, events)
    except MemoryError:
        limit = f" of {order.memory_bytes >> 20} MiB" if order.memory_bytes else ""
        message = f"the job needs more than the service's memory limit{limit}; start the service with more --memory"
        events.write("error", code="worker_died", message=message)
    except ServiceError as error:  # of an upload, whose sender waits for the answer
        events.write(
            "error", code="input", message=str(error), status=error.status, refusal=error.code, field=error.field
        )
    except UnreadableError as error:
        events.write("error", code="input", message=str(error), unreadable=error.digest)
    except TightfitError as error:
        events.write("error", code=JOB_ERRORS.get(type(error), "input"), message=str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            events.write("error", code="storage", message=str(error))
            return
        traceback.print_exc()
        events.write("error", code="internal", message=f"internal error, {type(error).__name__}: {error}")
    else:
        events.write("done", **result)


def _to_the_background() -> None:
    """Leave the processor to whoever waits for an answer, and end with the service: there is nothing to save."""
    os.nice(NICE)
    end_with_parent(signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
