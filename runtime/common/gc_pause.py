"""Python's cyclic garbage collector, kept from looking in vain: columns and instructions by the ten thousand hold no cycles."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Leave cycles for later. Reference counts free everything else as before."""
    if not gc.isenabled():
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()
