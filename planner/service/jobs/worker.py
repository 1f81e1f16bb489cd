"""A worker process, which does one job or reads one upload after the other: ``python -m
tightfit.planner.service.jobs.worker LANE``.

The first line of standard input is the job (`JobOrder`), every line an upload; standard output gets JSON lines:
``progress``, then ``done`` or ``error``. A solve or a measurement has nothing to save and ends with the service. A run
is asked to save and end when standard input closes. A job that dies takes nothing with it but itself.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.planner.service.wire.errors import JOB_ERRORS, ServiceError, UnreadableError
from tightfit.planner.service.wire.objects import Objects
from tightfit.planner.service.wire.redaction import Redaction
from tightfit.runtime.common.errors import InputError, TightfitError
from tightfit.runtime.common.parent import end_with_parent

NICE = 5
"""solving leaves the processor to whoever waits for an answer"""
FIRST_TO_GO = 500
"""oom_score_adj: where the machine is short of memory, a solve ends before the service does"""
PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class JobOrder:
    """What a worker is told."""

    kind: str
    request: dict[str, Any]
    objects: str
    """folder of the content-addressed files"""
    digests: dict[str, str]
    """id of each profile or plan that the request names -> digest of its object"""
    folder: str
    """of this job alone"""
    lock: str | None
    """held while the device is used"""
    command: list[str]
    """tightfit's command line"""
    memory_bytes: int | None
    folders: list[str]
    """whose files are named relative to them in what leaves the service"""
    paths: dict[str, str]
    """of a run's model, which its plan has without them"""

    def redaction(self) -> Redaction:
        return Redaction(map(Path, self.folders))

    def content(self, identity: str) -> bytes:
        """Of a profile or plan that the request names. Raises InputError where it is gone, UnreadableError where it is damaged."""
        if identity not in self.digests:
            raise InputError(f"what was stored as {identity} is gone since this was asked for; make it again")
        return Objects(Path(self.objects)).read(self.digests[identity])


class Tell:
    """Writes events where the service reads them, without paths but in the rows of files; progress at most every tenth of
    a second.
    """

    def __init__(self) -> None:
        # Libraries print; standard output is the service's.
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.redaction = Redaction([])
        self._last = 0.0
        self._lock = threading.Lock()

    def progress(self, *, always: bool = False, **what: Any) -> None:
        now = time.monotonic()
        if always or now - self._last >= PROGRESS_SECONDS:
            self._last = now
            self(event="progress", **what)

    def __call__(self, *, files: list[dict[str, Any]] | None = None, **event: Any) -> None:
        from tightfit.runtime.common.strict_json import to_json

        event = self.redaction.value(event)
        if files is not None:
            event["files"] = files
        with self._lock:
            self._file.write(to_json(event) + "\n")


def main(lane: str) -> int:
    tell = Tell()
    Path("/proc/self/oom_score_adj").write_text(str(FIRST_TO_GO))
    if lane != "cpu":
        _to_the_background()
    # Loaded before the order comes, and before its limit: that is for the work itself.
    if lane == "solve":
        import tightfit.planner.fleet.plan
        import tightfit.planner.report.compare
        import tightfit.planner.report.marginal_value
    elif lane == "upload":
        import tightfit.planner.service.jobs.upload_limits  # noqa: F401

        return _each_in_a_child(tell)
    words = sys.stdin.buffer.readline()
    if words:  # else the service has ended and needs nothing
        _carry_out(JobOrder(**json.loads(words)), tell)
    return 0


def _each_in_a_child(tell: Tell) -> int:
    """One upload after the other, each in a copy of this process, which has loaded what is needed
    and limits nothing.
    """
    while words := sys.stdin.buffer.readline():
        child = os.fork()
        if not child:
            try:
                end_with_parent(signal.SIGKILL)
                _carry_out(JobOrder(**json.loads(words)), tell)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
            tell(event="error", code="worker_died", message=f"the process of this upload died ({how})")
    return 0


def _carry_out(order: JobOrder, tell: Tell) -> None:
    """Carry out an order and report its result or error."""
    tell.redaction = order.redaction()
    carry_out: Callable[[JobOrder, Tell], dict[str, Any]]
    if order.kind == "run":
        from tightfit.planner.service.jobs.running import run as carry_out
    elif order.kind == "upload":
        from tightfit.planner.service.jobs.upload_limits import upload as carry_out
    else:
        from tightfit.planner.service.jobs import solving

        if order.kind == "profile":
            _to_the_background()
        carry_out = getattr(solving, order.kind)
    if order.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (order.memory_bytes, order.memory_bytes))
    try:
        answer = carry_out(order, tell)
    except MemoryError:
        limit = f" of {order.memory_bytes >> 20} MiB" if order.memory_bytes else ""
        tell(event="error", code="worker_died", message=f"the job needs more than the service's memory limit{limit}")
    except ServiceError as error:  # of what was uploaded: told to who waits for the answer
        tell(
            event="error", code="input", message=str(error), status=error.status, refusal=error.code, field=error.field
        )
    except UnreadableError as error:
        tell(event="error", code="input", message=str(error), unreadable=error.digest)
    except TightfitError as error:
        tell(event="error", code=JOB_ERRORS.get(type(error), "input"), message=str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            tell(event="error", code="storage", message=str(error))
            return
        traceback.print_exc()
        tell(event="error", code="internal", message=f"internal error, {type(error).__name__}: {error}")
    else:
        tell(event="done", **answer)


def _to_the_background() -> None:
    """Leave the processor to whoever waits for an answer, and end with the service: there is nothing to save."""
    os.nice(NICE)
    end_with_parent(signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
