"""Anonymous memory outside the heap. Also imported by the budgeted process: the standard library only."""

from __future__ import annotations

import mmap


def make_pages(size: int) -> mmap.mmap:
    """At least `size` bytes, zero, in whole pages of their own; of what is never touched the kernel makes no memory."""
    length = max(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE)
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # a 2 MiB page would make what is not touched around it resident
    return pages
