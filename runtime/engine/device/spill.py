"""The spill file on disk: holds the tensors that a plan offloads, each in an extent of its own.

The file has no name, so that nothing is left behind however the process ends. Its space is reserved when it is made: a
full disk is an error before the first step, not in the middle of one.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.files import nameless_file
from tightfit.runtime.common.run_folder import how_to_continue

BLOCK = 4096
STAGING_BYTES = 64 << 10
"""size of the aligned buffer through which parts of pages are copied, since direct I/O needs aligned memory"""


class SpillFile:
    """A file of `size` bytes in `directory`. Raises RunError if it cannot be made there or the disk lacks the space."""

    def __init__(self, directory: str, size: int) -> None:
        self.directory = directory
        self.size = _blocks(size)
        try:
            self.descriptor = nameless_file(directory)
        except OSError as error:
            raise RunError(
                f"no spill file can be made in {directory}: {error.strerror}; choose another output directory"
            ) from error
        self.direct = _set_direct(self.descriptor)
        try:
            if self.size:
                _reserve(self.descriptor, directory, self.size)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._staging = mmap.mmap(-1, STAGING_BYTES) if self.size else mmap.mmap(-1, BLOCK)
        self._view = memoryview(self._staging)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._staging))

    def write(self, address: int, size: int, offset: int) -> None:
        """Write `size` bytes of memory at `address` to the file at `offset`. Raises RunError if the disk refuses."""
        done = self._in_place(os.pwritev, address, size, offset)
        while done < size:
            part = min(STAGING_BYTES, size - done)
            ctypes.memmove(self._address, address + done, part)
            self._transfer(os.pwritev, self._view[: _blocks(part)], offset + done)
            done += part
        self._forget(offset, size)

    def read(self, address: int, size: int, offset: int) -> None:
        """Read `size` bytes of the file at `offset` into memory at `address`. Raises RunError if the disk refuses."""
        done = self._in_place(os.preadv, address, size, offset)
        while done < size:
            part = min(STAGING_BYTES, size - done)
            self._transfer(os.preadv, self._view[: _blocks(part)], offset + done)
            ctypes.memmove(address + done, self._address, part)
            done += part
        self._forget(offset, size)

    def zero(self, size: int, offset: int) -> None:
        """Write `size` zero bytes to the file at `offset`. Raises RunError if the disk refuses."""
        ctypes.memset(self._address, 0, STAGING_BYTES)
        for done in range(0, size, STAGING_BYTES):
            part = min(STAGING_BYTES, size - done)
            self._transfer(os.pwritev, self._view[: _blocks(part)], offset + done)
        self._forget(offset, size)

    def close(self) -> None:
        os.close(self.descriptor)

    def _in_place(self, call: object, address: int, size: int, offset: int) -> int:
        """Transfer the whole blocks of page-aligned memory directly, without the staging buffer; returns their
        bytes.
        """
        block_bytes = size // BLOCK * BLOCK if address % BLOCK == 0 else 0
        if block_bytes:
            self._transfer(call, memoryview((ctypes.c_char * block_bytes).from_address(address)).cast("B"), offset)
        return block_bytes

    def _transfer(self, call: object, memory: memoryview, offset: int) -> None:
        done, size = 0, len(memory)
        while done < size:
            try:
                moved = call(self.descriptor, [memory[done:]], offset + done)  # type: ignore[operator]
            except OSError as error:
                if error.errno == errno.EINVAL and self.direct:  # O_DIRECT was accepted, but not this transfer
                    self.direct = _set_direct(self.descriptor, on=False)
                    continue
                raise RunError(
                    f"spilling to {self.directory} failed: {error.strerror} ({size} bytes); free disk space and"
                    f" {how_to_continue(self.directory)}"
                ) from error
            if moved == 0:
                raise RunError(f"the spill file in {self.directory} ends early, at byte {offset + done} of {self.size}")
            done += moved

    def _forget(self, offset: int, size: int) -> None:
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def _blocks(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _set_direct(descriptor: int, *, on: bool = True) -> bool:
    import fcntl

    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return on


def _reserve(descriptor: int, directory: str, size: int) -> None:
    disk = os.fstatvfs(descriptor)
    free = disk.f_bavail * disk.f_frsize
    message = (
        f"the plan spills {size / 2**20:.1f} MiB and {directory} has {free / 2**20:.1f} MiB free; free disk space, or"
        " plan with more memory"
    )
    if free < size:
        raise RunError(message)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(message) from error
        os.ftruncate(descriptor, size)
