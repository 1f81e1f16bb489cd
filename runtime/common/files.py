"""Helpers for files: the cache folder, reading of regular files alone, atomic and complete writes, unnamed files, and
messages about file versions.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tightfit.runtime.common.errors import InputError, RunError

T = TypeVar("T")
IN_MEMORY = ("tmpfs", "ramfs")
"""file systems that keep files in memory"""
LARGEST_DOCUMENT = 256 << 20
"""bytes of a file that is read as a whole: a profile, a plan, a config, a list of prompts"""
WRITE_BEHIND_BYTES = 8 << 20
"""bytes of a large file that may wait in the page cache to be written"""
_OTHERS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def cache_directory() -> Path:
    """$TIGHTFIT_CACHE, or ~/.cache/tightfit."""
    return Path(os.environ.get("TIGHTFIT_CACHE") or Path.home() / ".cache" / "tightfit")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError, whose `strerror` says what it is, for a path that is no regular file: opening a pipe would wait
    for ever.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    kind = next((kind for is_kind, kind in _OTHERS if is_kind(mode)), None)
    if kind is not None:
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The regular file `path`, open for reading. Raises OSError, for anything else too."""
    check_regular(path)
    return open(path, "rb")


def read_whole(path: str | os.PathLike[str], *, most: int = LARGEST_DOCUMENT) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError, for a larger one too, of which nothing is
    read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"larger than the {most >> 20} MiB that such a file may have", os.fspath(path))
    return content


def write_whole(path: str | os.PathLike[str], content: str | bytes, *, mode: int = 0o666) -> Path:
    """Write `content` atomically: a reader of `path` finds the old file or the new one, never a part. Returns `path`.

    `mode`: the file's, before the umask. It is written beside `path`, flushed to disk and renamed. Raises InputError if
    it cannot be written there, RunError if the disk is full; nothing is left behind then.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{path}: the disk is full ({len(data)} bytes were to be written); free space and try again"
            ) from error
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another place with -o") from error
    return path


def takes_files(folder: Path) -> bool:
    """Whether files can be made in `folder`, and would lie on a disk of this machine.

    A folder that does not exist is judged by the nearest parent that does.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    system = _file_system(folder)
    elsewhere = system.startswith(
        ("nfs", "cifs", "smb", "fuse", "9p")
    )  # an I/O error there, in memory mapped from a file, would kill the process without a message
    return os.access(folder, os.W_OK | os.X_OK) and system not in IN_MEMORY and not elsewhere


def in_memory(path: Path) -> bool:
    """Whether the files of this folder are kept in memory, which a cgroup counts as the run's."""
    return _file_system(path) in IN_MEMORY


def _file_system(path: Path) -> str:
    """The kernel's name for the type of the file system that holds `path`; empty if unknown."""
    try:
        device = path.stat().st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number), "")


def nameless_file(directory: str) -> int:
    """Open a file without a name on the disk of `directory`; returns its descriptor.

    The file is gone once the last process has closed it. Raises OSError if it cannot be made.
    """
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):
        pass  # not every file system has O_TMPFILE
    import tempfile

    descriptor, path = tempfile.mkstemp(prefix=".tightfit-", dir=directory)
    os.unlink(path)
    return descriptor


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`. A single write may take less: when the disk is nearly full, or a signal interrupts a
    pipe.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_all(descriptor: int, memory: memoryview, offset: int) -> int:
    """Fill `memory` from the file at `offset`; the number of bytes read, fewer than it holds only where the file ends.

    A single read may take less: Linux reads at most 2 GiB at a time.
    """
    done = 0
    while done < len(memory) and (read := os.preadv(descriptor, [memory[done:]], offset + done)):
        done += read
    return done


def forget(descriptor: int, start: int = 0, size: int = 0) -> None:
    """Drop `size` bytes of a file from `start` on, or all of them, from the page cache, but for what is not written
    yet.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


class WriteBehind:
    """Has a file written to disk, and dropped from the page cache, each time that `most` bytes of it wait there: a
    cgroup counts them as the memory of the processes that wrote them.
    """

    def __init__(self, descriptor: int, most: int = WRITE_BEHIND_BYTES) -> None:
        self._descriptor, self._most, self._waiting = descriptor, most, 0

    def wrote(self, size: int) -> None:
        """`size` more bytes have been written. Raises OSError if the disk refuses."""
        self._waiting += size
        if self._waiting >= self._most:
            os.fdatasync(self._descriptor)
            forget(self._descriptor)
            self._waiting = 0

    def finish(self) -> None:
        """The file is complete. Raises OSError if the disk refuses."""
        os.fsync(self._descriptor)
        forget(self._descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; none is fine."""
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_orphans(place: Path) -> None:
    """Remove what killed processes left beside `place`: ``.NAME.PID.partial`` and the like."""
    for partial in place.parent.glob(f".{place.name}.*.partial"):
        writer = partial.name.removeprefix(f".{place.name}.").split(".")[0]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists() and Path("/proc/self").exists():
            remove(partial)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Flush a directory's list of files to disk, so that a rename in it survives a crash."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise InputError if no file can be written at `path`; called before the work whose result goes there."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: a directory; name a file")
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another place") from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written ({nearest} is no folder that takes files); name another place")


def of_another_version(kind: str, version: Any, read: int) -> str:
    """Message for a file of `version` when this tightfit reads version `read`; `kind` is "profile" or "plan"."""
    if isinstance(version, int) and not isinstance(version, bool):
        age = "an older" if version < read else "a newer"
        return f"written by {age} version of tightfit ({kind} version {version}, this one reads version {read})"
    return f"{kind} version {version!r}, this tightfit reads version {read}"
