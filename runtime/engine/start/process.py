"""Keeps a training process small: its environment, and the pages of libraries and heap that it gives back to the
kernel.

Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import NoReturn

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.engine.cpu import native_dropout
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.weights import native

_MADV_DONTNEED, _MADV_NOHUGEPAGE, _MADV_DONTDUMP = 4, 15, 16
_LOOKED_AT = 32 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
SPARE_MAPPINGS = 16384
"""mappings that `narrow_file_mappings` leaves free; threads, libraries, large buffers and the moved heap take about
300"""
_GROUPS = (1, 2, 4, 8)
"""sizes in pages of the groups that `narrow_file_mappings` may make; the kernel's fault-around maps 16 pages at a
time"""
_AROUND = (16, 32, 64, 128, 256)
"""sizes in pages of the parts that `split_file_mappings` may make; one of 512 would hold a folio of the largest size"""
_FILE, _WRITTEN = 1 << 61, 1 << 62
"""bits of a page's entry in /proc/self/pagemap: it belongs to a file; it is swapped out (bit 63: it is in memory)"""

LARGEST = 32 << 20
"""bytes from which on malloc gives a buffer a mapping of its own instead of a place in the heap; the most that glibc
allows"""
_M_MMAP_THRESHOLD = -3


def child_environment(threads: int) -> dict[str, str]:
    """The environment of every lean process: of runs, of measuring the floor, and of timing operators.

    - One malloc arena (MALLOC_ARENA_MAX): otherwise threads would keep an arena each.
    - A fixed mmap threshold (32 MiB is glibc's highest) and no trimming: the transient buffers of operators reuse the
      same heap pages. With glibc's own moving threshold each step would fault its workspace in anew.
    - No per-thread cache of freed small blocks (tcache): a cached block behind an operator's freed buffers keeps them
      from merging with the free end of the heap, so that the next larger buffer is placed behind it. Without the cache
      the peaks of runs of one plan differ by 0.2 MB, with it by up to 2 MB; no difference in time was measured.
    - OpenMP threads spin for about 0.1 ms, then sleep (GOMP_SPINCOUNT), because the transfer thread and other processes
      need the cores too: with the cores shared, a 1024 x 576 x 8 product took 0.19 ms, and 16 ms with the default of
      spinning for milliseconds. That is long enough not to sleep between two short operators: with a fourth of it a
      step of SmolLM2-135M on two Zen 3 cores, weights streamed, took 4 to 30 % longer.
    """
    keep = (
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "VIRTUAL_ENV",
        "TIGHTFIT_TORCH",
        "PYTHONDONTWRITEBYTECODE",
    )
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment.update(
        {
            native.VARIABLE: native.library(cache_directory()),
            native_dropout.VARIABLE: native_dropout.library(cache_directory()),
            page_out.VARIABLE: page_out.library(cache_directory()),
            cuda_stubs.VARIABLE: cuda_stubs.folder(cache_directory()),
        },
        GLIBC_TUNABLES="glibc.malloc.tcache_count=0",
        MALLOC_ARENA_MAX="1",
        MALLOC_MMAP_THRESHOLD_=str(LARGEST),
        MALLOC_TRIM_THRESHOLD_=str(1 << 30),
        MALLOC_TOP_PAD_=str(64 << 10),
        OMP_NUM_THREADS=str(threads),
        GOMP_SPINCOUNT="4000",
        MKL_NUM_THREADS=str(threads),
        PYTHONHASHSEED="0",
        PYTHONNOUSERSITE="1",
        PYTHONPATH=interpreter.python_path(),
    )
    return environment


def release_file_pages() -> int:
    """Unmap the resident pages of read-only file mappings (code and constants of libraries); returns their bytes.

    They are clean copies of files: the kernel maps them again from its page cache when they are next touched. Pages
    that were ever written are left. Without this an idle PyTorch process holds about 50 MiB of code that only ran while
    it started. Returns 0 where /proc/self/pagemap cannot be read.
    """
    libc = ctypes.CDLL(None)
    released = 0
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    for start, end in _read_only_files():
        entries = array("Q", os.pread(pagemap, (end - start) // _PAGE * 8, start // _PAGE * 8))
        entries.append(_WRITTEN)
        first = resident = 0
        # A page that was written (by the dynamic linker, before it was made read-only) is no copy of the file:
        # unmapping it would lose what was written.
        for page, entry in enumerate(entries):
            if entry & _FILE:
                resident += entry >> 63
            elif entry >> 62:
                if resident:
                    address, size = start + first * _PAGE, (page - first) * _PAGE
                    refused = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_DONTNEED)
                    released += 0 if refused else resident * _PAGE
                first, resident = page + 1, 0
    os.close(pagemap)
    return released


def _read_only_files() -> Iterator[tuple[int, int]]:
    """Address ranges [start, end) of adjacent private, read-only file mappings, split so that a range is about 32 MiB
    at most.

    Read from /proc/self/maps: smaps, which also tells what was written, takes 0.1 s where there are ten thousand
    mappings.
    """
    start = end = 0
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            addresses, permissions, _, _, inode, *_ = line.split(None, 5)
            if permissions[1:2] != b"-" or permissions[3:4] != b"p" or inode == b"0":
                continue
            low, high = (int(edge, 16) for edge in addresses.split(b"-"))
            if low != end or high - start > _LOOKED_AT:
                if end > start:
                    yield start, end
                start = low
            end = high
    if end > start:
        yield start, end


def split_file_mappings() -> int:
    """Have a fault in a file mapping map 64 KiB at most; returns the mappings made. Call it before code runs that is to
    stay.

    Linux 6.18 maps the whole folio in which a page of a file lies, if the mapping holds all of it, and earlier ones do
    so with folios of 2 MiB. How large the folios of a library are depends on how it came into the page cache: pages
    that faults read are small, ext4 and XFS make up to 2 MiB of what was read ahead or written in one go. So one
    instruction that is run for the first time in a step mapped 64 KiB or 2 MiB, and warming up the kernels took 66 or
    188 MiB. Here every second part of 64 KiB (what "fault-around" maps anyway) gets a flag of its own, which has no
    other effect on files, and becomes a mapping; parts are larger where a process may not have so many.
    """
    libc = ctypes.CDLL(None)
    spare = most_mappings() - SPARE_MAPPINGS
    edges = array("Q")
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            spare -= 1
            parts = line.split(None, 5)
            start, end = (int(edge, 16) for edge in parts[0].split(b"-"))
            if len(parts) == 6 and parts[5].startswith(b"/") and b"w" not in parts[1]:
                edges.extend((start, end))
    most = max(spare, 0) // 4  # of which each makes two mappings: half of the room is left for narrowing them
    size = next((size for size in _AROUND if sum(1 for _ in _second_parts(edges, size)) <= most), _AROUND[-1])
    mappings = 0
    for start, end in islice(_second_parts(edges, size), most):
        # Refused where the kernel has no huge pages, and so no large folios.
        refused = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_NOHUGEPAGE)
        mappings += 0 if refused else 2
    return mappings


def _second_parts(edges: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """The odd-numbered parts of `size` pages of address ranges whose first and last addresses alternate in `edges`;
    ranges of that size or less are left whole.
    """
    step = size * _PAGE
    for start, end in zip(edges[::2], edges[1::2]):
        if end - start > step:
            for at in range((start // step | 1) * step, end, 2 * step):
                yield at, min(end, at + step)


def narrow_file_mappings() -> int:
    """Let the kernel map only the pages of library code that are used, not their neighbours; returns the mappings made.

    On a fault in a file mapping the kernel also maps the 15 pages around it that it has cached ("fault-around"), which
    triples the resident code of a process that uses a few hundred kernels out of a 300 MiB library. It never crosses
    from one mapping to the next; so wherever pages are mapped now, every second page gets a flag of its own (excluded
    from core dumps: no other effect) and becomes a mapping. Call it once the code that matters has run.

    A process may have `vm.max_map_count` mappings, and one that has them all gets no more memory. If flagging every
    second page would leave fewer than `SPARE_MAPPINGS` free, every second group of 2, 4 or 8 pages is flagged instead,
    the same size everywhere; of groups of 8 as many as still leave that number free.
    """
    libc = ctypes.CDLL(None)
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    spare = most_mappings() - SPARE_MAPPINGS
    files = []
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            spare -= 1
            parts = line.split(None, 5)
            start, end = (int(edge, 16) for edge in parts[0].split(b"-"))
            if end - start > _PAGE and len(parts) == 6 and parts[5].startswith(b"/") and b"w" not in parts[1]:
                files.append((start, end))
    mapped = array("Q")  # numbers of pages
    for start, end in files:
        entries = array("Q", os.pread(pagemap, (end - start) // _PAGE * 8, start // _PAGE * 8))
        mapped.extend(page for page, entry in enumerate(entries, start // _PAGE) if entry >> 63)
    os.close(pagemap)
    most = max(spare, 0) // 2  # groups: each flag makes two mappings, of the group and of what follows it
    size = next((size for size in _GROUPS if sum(1 for _ in _every_second(mapped, size)) <= most), _GROUPS[-1])
    mappings = 0
    for group in islice(_every_second(mapped, size), most):
        address, length = group * size * _PAGE, size * _PAGE
        refused = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_DONTDUMP)
        mappings += 0 if refused else 2
    return mappings


def _every_second(pages: Iterable[int], size: int) -> Iterator[int]:
    """The odd-numbered groups of `size` pages that contain one of `pages`, which are page numbers in ascending
    order.
    """
    last = -1
    for page in pages:
        group = page // size
        if group % 2 and group != last:
            last = group
            yield group


def most_mappings() -> int:
    """How many mappings a process may have: `vm.max_map_count`, or the kernel's default if that cannot be read."""
    try:
        with open("/proc/sys/vm/max_map_count", "rb") as file:
            return int(file.read())
    except OSError:
        return 65530


def trim_heap() -> None:
    """Give free heap pages back to the kernel (glibc only)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


@contextmanager
def apart(size: int) -> Iterator[None]:
    """While the block runs, malloc gives buffers of `size` bytes and more mappings of their own (glibc only).

    Small blocks that outlive them are then not scattered between them over the heap, where they would leave holes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, size)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST)


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main`, print a TightfitError that it raises, and end the process with its exit code by `os._exit`.

    Python's and PyTorch's own clean-up would touch all the memory that `page_out` moved to a file, and bring it back.
    """
    try:
        code = main()
    except TightfitError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed
            stream.flush()
    os._exit(code)
