"""Carries out a command of tightfit that prints JSON lines, as a process that ends with its worker."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from signal import SIGKILL

from tightfit.planner.service.jobs.running import failure_of
from tightfit.planner.service.jobs.store import Row
from tightfit.runtime.common.parent import end_with_parent


def carry_out(command: Sequence[str], what: str, lock: int, each: Callable[[Row], None] = lambda printed: None) -> Row:
    """The last object that the command prints; `each` is called with all of them. The process holds the lock as long as
    it lives.

    Raises what the command failed with; `what` it is, for one that said nothing.
    """
    last: Row = {}
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=(lock,),
            preexec_fn=partial(end_with_parent, SIGKILL),  # noqa: PLW1509  no thread runs yet
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            try:
                last = json.loads(line)
            except ValueError:  # a library's own words
                continue
            each(last)
        code = child.wait()
        stderr.seek(0)
        said = (stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    if code or not last or "error" in last:
        raise failure_of(code, last, f"{what} {{}}: {said}")
    return last
