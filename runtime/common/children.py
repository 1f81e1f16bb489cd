"""The one way in which tightfit starts processes of its own: in which environment, what ends them, and what they said
last.

Also imported by supervisors: the standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO, Any

from tightfit.runtime.common.interpreter import python_path
from tightfit.runtime.common.parent import end_with_parent

LAST_BYTES = 1 << 16
"""of what a process has said that are looked at"""
SILENT = "it said nothing"


def own_environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs these very packages: this process's own, and `more`."""
    return os.environ | {"PYTHONPATH": python_path()} | more


def start(
    words: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    orphaned: signal.Signals | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start a command that reads nothing unless `options`, those of `Popen`, say so, in `own_environment` unless
    another is given. The kernel sends it the signal `orphaned` when this process ends, however it does.
    """
    if orphaned is not None:  # a call of the kernel: no lock is taken between fork and exec
        options["preexec_fn"] = partial(end_with_parent, orphaned)
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen(words, env=own_environment() if environment is None else environment, **options)


def last_words(said: IO[bytes] | str, otherwise: str = SILENT) -> str:
    """The last line of what a process has said, in a file or as it is; `otherwise` where it said nothing."""
    if not isinstance(said, str):
        said.seek(max(0, said.seek(0, os.SEEK_END) - LAST_BYTES))
        said = said.read().decode(errors="replace")
    lines = said.strip().splitlines()
    return lines[-1] if lines else otherwise
