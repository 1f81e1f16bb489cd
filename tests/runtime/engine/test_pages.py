import ctypes
import gc
import mmap
import sys
from pathlib import Path

import pytest

from tightfit.runtime.engine.cpu.arena import Arena
from tightfit.runtime.engine.cpu.pages import HUGE_BYTES, make_pages


def flags(pages):
    """What the kernel was told of the mapping (VmFlags of smaps), and its resident bytes."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    found, resident = None, 0
    with Path("/proc/self/smaps").open() as file:
        inside = False
        for line in file:
            head = line.split()[0]
            if "-" in head and ":" not in head:
                low, high = (int(edge, 16) for edge in head.split("-"))
                inside = low <= address < high
            elif inside and head == "Rss:":
                resident = int(line.split()[1]) * 1024
            elif inside and head == "VmFlags:":
                found = line.split()[1:]
    return found, resident


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_is_all_used_asks_for_huge_pages_and_what_is_not_refuses_them():
    used, unused = make_pages(4 * HUGE_BYTES, used=True), make_pages(4 * HUGE_BYTES)
    if not hasattr(mmap, "MADV_HUGEPAGE") or "hg" not in flags(used)[0]:
        pytest.skip("a kernel without huge pages")
    assert "nh" in flags(unused)[0]
    assert "hg" in flags(Arena(4 * HUGE_BYTES)._map)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_of_pages_that_may_not_be_used_only_those_that_are_touched_become_resident():
    pages = make_pages(4 * HUGE_BYTES)
    before = flags(pages)[1]  # the kernel may show neighbours as one mapping
    pages[HUGE_BYTES] = 1
    assert flags(pages)[1] - before == mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_an_arena_never_holds_more_than_its_size():
    """Huge pages lie wholly inside: the last bytes of an arena are in small ones."""
    gc.collect()  # arenas of earlier tests: their pages, given back meanwhile, may be counted in the same mapping
    arena = Arena(HUGE_BYTES * 3 + 100)
    before = flags(arena._map)[1]
    arena.bytes.fill_(1)
    assert HUGE_BYTES * 3 < flags(arena._map)[1] - before <= HUGE_BYTES * 3 + mmap.PAGESIZE
