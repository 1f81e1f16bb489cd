"""A process that does not outlive the one it works for. Also imported by the budgeted process: the standard library only."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send `number` to this process once its parent has ended, however that ends; Linux alone can.

    The thread of the parent that started this process counts as the parent, though the others may go on. One that has ended
    already is not noticed.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
