"""Carries out a command of tightfit that prints JSON lines, as a process that ends with its worker."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from signal import SIGKILL

from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.jobs.work.run import failure_of
from tightfit.runtime.common.children import last_words, start


def carry_out(command: Sequence[str], what: str, lock: int, each: Callable[[Row], None] = lambda printed: None) -> Row:
    """The last object that the command prints; `each` is called with all of them. The process holds the lock as long as
    it lives.

    Raises what the command failed with; `what` it is, for one that said nothing.
    """
    last: Row = {}
    with (
        tempfile.TemporaryFile() as stderr,
        start(command, stdout=subprocess.PIPE, stderr=stderr, pass_fds=(lock,), orphaned=SIGKILL) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            try:
                last = json.loads(line)
            except ValueError:  # a library's own words
                continue
            each(last)
        code = child.wait()
        said = last_words(stderr)
    if code or not last or "error" in last:
        raise failure_of(code, last, f"{what} {{}}: {said}")
    return last
