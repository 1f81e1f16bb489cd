"""Has the kernel signal a process when its parent ends, so that it does not outlive it.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send signal `number` to this process when its parent ends, however it does; a no-op outside
    Linux.

    The kernel sends it already when the parent's thread that started this process ends, even if the parent goes on. If
    the parent has ended before this call, no signal comes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
