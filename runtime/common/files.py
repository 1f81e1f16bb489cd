"""Files: where the cache lies, results that are written whole or not at all, and what is said of another version."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tightfit.runtime.common.errors import InputError, RunError

IN_MEMORY = ("tmpfs", "ramfs")
"""file systems without a disk"""


def cache_directory() -> Path:
    """$TIGHTFIT_CACHE, or ~/.cache/tightfit."""
    return Path(os.environ.get("TIGHTFIT_CACHE") or Path.home() / ".cache" / "tightfit")


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` beside `path`, flush it to disk and rename it: a reader finds the old file or the new, never a part.

    Raises InputError where the place cannot be written and RunError where the disk is full; nothing is left behind then.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
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
    """Whether files may be made in a folder, or where it will be, and lie on a disk of this machine."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    system = _file_system(folder)
    elsewhere = system.startswith(
        ("nfs", "cifs", "smb", "fuse", "9p")
    )  # whose errors would end a process without words
    return os.access(folder, os.W_OK | os.X_OK) and system not in IN_MEMORY and not elsewhere


def in_memory(path: Path) -> bool:
    """Whether the files of this folder are memory, which a run's cap counts."""
    return _file_system(path) in IN_MEMORY


def _file_system(path: Path) -> str:
    """Its type, as the kernel calls it; empty where it cannot be told."""
    try:
        device = path.stat().st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number), "")


def nameless_file(directory: str) -> int:
    """A descriptor of a file in `directory` that nobody else sees, and that is gone with its last user. Raises OSError."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):
        pass  # not every file system has them
    import tempfile

    descriptor, path = tempfile.mkstemp(prefix=".tightfit-", dir=directory)
    os.unlink(path)
    return descriptor


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """All of it: what a disk has room for or a pipe has taken when a signal comes may be less."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Force to disk which files a directory has."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(path: Path) -> None:
    """Raise InputError where no file can be written at `path`: better said before the work that the file is to hold."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: a directory; name a file")
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another place") from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written ({nearest} is no folder that takes files); name another place")


def of_another_version(kind: str, found: Any, read: int) -> str:
    """What is wrong with a profile or plan of version `found` where version `read` is read."""
    if isinstance(found, int) and not isinstance(found, bool):
        age = "an older" if found < read else "a newer"
        return f"written by {age} version of tightfit ({kind} version {found}, this one reads version {read})"
    return f"{kind} version {found!r}, this tightfit reads version {read}"
