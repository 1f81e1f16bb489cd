"""Moves memory that PyTorch's start allocates and a step hardly reads to a file (``page_out.c``): 56 MiB less resident.

The file has no name, so that it is gone when the process ends, however it does. All stays in memory where there is no C
compiler, or where the cache does not lie on a disk that takes files; the floor is measured in the same way, so that
predictions hold either way.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tightfit.runtime.common import machine_code
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.files import nameless_file, takes_files

VARIABLE = "TIGHTFIT_COLD"
"""Environment variable with the library's path, beside which the file is made; empty: all stays in memory."""
SOURCE = Path(__file__).with_name("page_out.c")
FLAGS = ("-O2", "-Wl,-z,now")  # symbols bound at loading: the signal handler may have interrupted the dynamic linker
START_BYTES = 60 << 20
"""Resident bytes above which memory is moved while PyTorch loads. The lower, the longer the start takes (0.4 s more
with this one, 1 s with 30 MiB); less gains nothing, because warming up the kernels takes as much afterwards."""
LOOK_MICROSECONDS = 250
"""time between two readings of the resident bytes"""
JUDGED_BLOCKS = 16384
"""heap blocks of 2 KB with which `judge` tests the library"""


def library(cache: Path) -> str:
    """Path of the tested library in `cache`, built now if need be; empty if it cannot be built or used, or fails the
    test.
    """
    if os.environ.get(VARIABLE) is not None:
        return os.environ[VARIABLE]
    if not takes_files(machine_code.folder(cache)):
        return ""
    return machine_code.library(SOURCE, FLAGS, cache, "tightfit.runtime.engine.start.page_out", {VARIABLE: ""})


def in_use() -> bool:
    """Whether this process was told to move memory (`VARIABLE` names a library)."""
    return bool(os.environ.get(VARIABLE))


@contextmanager
def moving() -> Iterator[None]:
    """Move heap memory to the file while the block runs, and once more at its end.

    The process must have a single thread until then. Raises RunError if the disk refuses; an error that the block
    itself raises goes first.
    """
    path = os.environ.get(VARIABLE, "")
    if not path:
        yield
        return
    folder = str(Path(path).parent)
    try:
        descriptor = nameless_file(folder)
    except OSError as error:
        raise _move_error(folder, error.errno or 0) from error
    try:
        mover = _load(path, folder)
        if failure := mover.begin(_heap(), descriptor, START_BYTES):
            raise _move_error(folder, failure)
        try:
            yield
        finally:
            failure = mover.end()
        if failure:
            raise _move_error(folder, failure)
        _moved.append(mover)
    finally:
        os.close(descriptor)


def release() -> None:
    """Release the file's pages that are in memory but have not been written since it was made; no-op if nothing was
    moved.
    """
    for mover in _moved:
        mover.release()


class _Mover:
    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self._begin, self._end, self.release = (
            library.tightfit_cold_begin,
            library.tightfit_cold_end,
            library.tightfit_cold_release,
        )
        self.release.restype = None
        self._begin.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_long)

    def begin(self, heap: int, descriptor: int, most: int) -> int:
        """Start moving; returns 0 or an errno."""
        return int(self._begin(heap, descriptor, most, LOOK_MICROSECONDS))

    def end(self) -> int:
        """Move once more and stop; returns 0, an errno, or -1 if the process has a second thread."""
        return int(self._end())


_moved: list[_Mover] = []


def _load(path: str, folder: str) -> _Mover:
    try:
        return _Mover(path)
    except (OSError, AttributeError) as error:
        raise RunError(f"{path} is gone or damaged; {folder} was cleaned meanwhile, try again") from error


def _heap() -> int:
    """The heap's first address. Raises StopIteration if the process has none."""
    with Path("/proc/self/maps").open("rb") as file:
        return next(int(line.partition(b"-")[0], 16) for line in file if line.endswith(b"[heap]\n"))


def _move_error(folder: str, failure: int) -> RunError:
    problem = "what PyTorch's start leaves cannot be moved to a file"
    if failure < 0:
        return RunError(
            f"{problem}: the process has a second thread; set {VARIABLE}= and profile again to keep it in memory"
        )
    advice = f"name another cache with TIGHTFIT_CACHE, or set {VARIABLE}= and profile again to keep it in memory"
    if failure in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = f"free 65 MB there, or {advice}"
    return RunError(f"{problem} in {folder}: {os.strerror(failure)}; {advice}")


def judge(path: str) -> list[str]:
    """["heap"] if the library works here, else []: moved heap memory keeps its contents, takes writes, and is not
    resident.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks: list[int] = []
    texts: list[bytes] = []

    def fill(turn: int, *, more: int = 0, of: int = JUDGED_BLOCKS) -> None:
        blocks.extend(libc.malloc(ctypes.c_size_t(2000)) for _ in range(more))
        texts[:of] = [b"%6d,%6d" % (number, turn) for number in range(len(blocks[:of]))]
        for block, text in zip(blocks, texts[:of]):
            ctypes.memmove(block, text, 13)

    def kept() -> bool:
        return all(ctypes.string_at(block, 13) == text for block, text in zip(blocks, texts))

    before = _resident()
    fill(0, more=JUDGED_BLOCKS // 2)
    mover = _Mover(path)
    descriptor = nameless_file(str(Path(path).parent))
    failure = mover.begin(_heap(), descriptor, _resident() - JUDGED_BLOCKS * 500)
    fill(1)
    fill(2, more=JUDGED_BLOCKS // 2)
    failure = mover.end() or failure
    os.close(descriptor)
    more = _resident() - before
    unchanged = kept()
    fill(3, of=JUDGED_BLOCKS // 2)  # the rest has only been read
    mover.release()
    return ["heap"] if not failure and unchanged and kept() and more < JUDGED_BLOCKS * 500 else []


def _resident() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(judge(sys.argv[1])))
    except (OSError, StopIteration):  # a cache mounted noexec, or an allocator without a heap
        sys.stdout.write("[]")
