"""Memory cgroups (Linux, v1 or v2): where one can be made around a run, the kernel itself enforces the cap."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
_remaining: set[Path] = set()
"""cgroups that this process made and could not remove yet, since a process in them lived on"""


class MemoryCgroup:
    """A cgroup, which is a directory `path` of the cgroup file system.

    Its limit counts anonymous memory, and the page cache that its processes read in; the kernel reclaims page cache
    before it kills a process.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.version = version

    def __repr__(self) -> str:
        return f"MemoryCgroup({str(self.path)!r}, v{self.version})"

    @classmethod
    def create(cls, limit_bytes: int, mount: Path = MOUNT) -> MemoryCgroup | None:
        """Make a cgroup with this limit in bytes; None if this process may not make one."""
        _remaining.difference_update([path for path in _remaining if _remove(path)])
        for parent, version in _parents(mount):
            _sweep(parent)
            path = parent / f"tightfit-{os.getpid()}-{time.monotonic_ns()}"
            try:
                path.mkdir()
            except OSError:
                continue
            group = cls(path, version)
            try:
                group._limit(limit_bytes)
            except OSError:
                group.remove()
                continue
            return group
        return None

    @staticmethod
    def home() -> str | None:
        """Path of the cgroup that this process is in, for `leave`; None if unknown."""
        return next((str(parent) for parent, _ in _parents(MOUNT)), None)

    def leave(self, home: str | None) -> None:
        """Move this process back to the cgroup `home` and remove this one; does nothing if `home` is None."""
        if home is not None:
            with contextlib.suppress(OSError):
                (Path(home) / "cgroup.procs").write_text(str(os.getpid()))
            self.remove()

    def enter(self, command: list[str]) -> list[str]:
        """The command line that runs `command` in this cgroup.

        A shell joins the cgroup and then becomes the command (exec), so that all of the command's memory counts.
        """
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """Highest number of bytes charged so far, page cache included; None if the kernel does not keep it."""
        return _number(self.path / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"))

    def oom_kills(self) -> int:
        """How many processes the kernel has killed because of the limit."""
        try:
            text = (self.path / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text()
        except OSError:
            return 0
        counts = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
        return int(counts.get("oom_kill", 0))

    def remove(self) -> None:
        """Remove the cgroup. Gives up after a second while a process in it lives on, and otherwise after ten, which the
        kernel may take on a busy machine until the last process has left; the next `create` tries again.
        """
        begun = time.monotonic()
        while not _remove(self.path):
            waited = time.monotonic() - begun
            if waited > (1.0 if _inhabited(self.path) else 10.0):
                _remaining.add(self.path)
                return
            time.sleep(0.02)

    def _limit(self, limit: int) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        name, swap = (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
            if self.version == 1
            else ("memory.max", "memory.swap.max")
        )
        (self.path / name).write_text(str(limit // page * page))
        if (self.path / swap).exists():
            (self.path / swap).write_text(str(limit // page * page) if self.version == 1 else "0")


def own_cgroups(proc: Path = Path("/proc")) -> dict[int, str]:
    """Path of this process's memory cgroup below the mount, by version (1, 2), as far as the kernel tells."""
    paths: dict[int, str] = {}
    try:
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                paths[1] = path
            elif not controllers:
                paths[2] = path
    except OSError:
        pass
    return paths


def _parents(mount: Path) -> Iterator[tuple[Path, int]]:
    """(directory, version) of cgroups in which to make a new one: this process's own, then the root; v1 before v2."""
    own_paths = own_cgroups()
    first = mount / "memory"
    if (first / "memory.limit_in_bytes").exists() or (first / "cgroup.procs").exists():
        for path in (own_paths.get(1, "/"), "/"):
            yield first / path.lstrip("/"), 1
    for second in (mount, mount / "unified"):
        if (second / "cgroup.controllers").exists():
            for path in (own_paths.get(2, "/"), "/"):
                yield second / path.lstrip("/"), 2


def _sweep(parent: Path) -> None:
    """Remove empty cgroups of tightfit whose maker was killed."""
    for path in parent.glob("tightfit-*"):
        pid = path.name.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):  # it is still in use, or another user's
                path.rmdir()


def _remove(path: Path) -> bool:
    """Remove a cgroup that may be gone already; whether it is gone now."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _inhabited(path: Path) -> bool:
    """Whether a process that has not ended is in a cgroup."""
    try:
        return bool((path / "cgroup.procs").read_text())
    except OSError:
        return False


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
