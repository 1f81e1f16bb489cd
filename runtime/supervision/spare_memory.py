"""How much memory the machine can spare now for a run: what is available, limits of cgroups and of the shell, a margin.

Memory that is swapped out makes a step many times slower than one that was planned for less memory. Therefore swap
does not count, and a margin stays free for what other programs, and the kernel's cache of the weights' file, need while
the run goes on.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.limits import LIMITS
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.supervision.cgroup import MOUNT, own_cgroups

MARGIN = 8
"""the part of the available memory that stays free is one in this many"""
LEAST_MARGIN = 128 * MIB
"""of what is available on the machine, where other programs come and go; of a limit of its own a run needs no such
margin
"""


def spare_memory(proc: Path = Path("/proc"), mount: Path = MOUNT, *, given_back: int = 0) -> tuple[int, str]:
    """(bytes that a run may have now, whole MiB, and in words where that figure comes from).

    It is the smallest of three, each less a margin: the kernel's estimate of what programs can get without swapping
    (MemAvailable), what is left of the limit of this process's cgroup or one above it, and the limits on what a process
    may reserve (`ulimit -v`, `ulimit -d`). `given_back` are bytes that this process holds and will not hold beside the
    run. Raises InputError where that leaves nothing.
    """
    spare, margin, source = min(
        ((left - _margin(left, least)) // MIB * MIB, _margin(left, least), why)
        for left, why, least in _free(proc, mount, given_back, unmapped=False)
    )
    if spare <= 0:
        raise InputError(
            f"{spelled('memory', 'auto')}: {source}, and {format_size(margin)} of that stay free; end other programs,"
            " or name a size"
        )
    return spare, f"{source}, less {format_size(margin)} that stay free"


def free_memory(
    proc: Path = Path("/proc"), mount: Path = MOUNT, *, given_back: int = 0, unmapped: bool = False
) -> tuple[int, str]:
    """As `spare_memory`, without a margin. With `unmapped`, all page cache of a cgroup counts as left that no process
    has mapped, even if it was used lately: before it kills, the kernel takes that back too.
    """
    return min((left, why) for left, why, _ in _free(proc, mount, given_back, unmapped=unmapped))


def _margin(left: int, least: int) -> int:
    return max(left // MARGIN, least)


def _free(proc: Path, mount: Path, given_back: int, *, unmapped: bool) -> Iterator[tuple[int, str, int]]:
    """(bytes, where they come from, the least of them that is to stay free)."""
    available, why = _available(proc, given_back)
    yield available, why, LEAST_MARGIN
    for left, why in (*_left_in_cgroups(proc, mount, given_back, unmapped=unmapped), *_ulimits()):
        yield left, why, 0


def _available(proc: Path, given_back: int) -> tuple[int, str]:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        size = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")) + given_back
    except (OSError, StopIteration, ValueError, IndexError) as error:
        raise InputError(
            f"{spelled('memory', 'auto')}: the kernel does not say what is available (MemAvailable); name a size"
        ) from error
    return size, f"{format_size(size)} are available on this machine"


def _left_in_cgroups(proc: Path, mount: Path, given_back: int, *, unmapped: bool) -> Iterator[tuple[int, str]]:
    """What is left of each limit on this process's cgroup and those above it.

    Page cache that was not used lately counts as left: the kernel takes it back before it kills. `unmapped`: as of
    `free_memory`.
    """
    own_paths = own_cgroups(proc)
    for path in _upwards(mount / "memory", own_paths.get(1)):
        limit, used = _number(path / "memory.limit_in_bytes"), _number(path / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            yield _rest_of(path, limit, used - given_back - _cache(path, V1_CACHE, unmapped=unmapped))
    for root in (mount, mount / "unified"):
        for path in _upwards(root, own_paths.get(2)):
            limits = [_number(path / name) for name in ("memory.max", "memory.high")]
            limit, used = (
                min((limit_set for limit_set in limits if limit_set is not None), default=None),
                _number(path / "memory.current"),
            )
            if limit is not None and used is not None:
                yield _rest_of(path, limit, used - given_back - _cache(path, V2_CACHE, unmapped=unmapped))


def _upwards(mount: Path, own: str | None) -> Iterator[Path]:
    """The directories of the cgroup `own` and of all above it, up to `mount`.

    In a container the path may be that of the host, whose upper parts are not there.
    """
    if own is not None:
        path = mount / own.lstrip("/")
        yield path
        while path != mount:
            path = path.parent
            yield path


def _rest_of(cgroup: Path, limit: int, used: int) -> tuple[int, str]:
    left = max(0, limit - used)
    return left, f"{format_size(left)} are left of the {format_size(limit)} of the cgroup {cgroup}"


V1_CACHE = ("total_inactive_file", "total_active_file", "total_mapped_file")
V2_CACHE = ("inactive_file", "active_file", "file_mapped")
"""names in a cgroup's statistics: page cache that was not used lately, that was, and what of both processes have
mapped
"""


def _cache(cgroup: Path, names: tuple[str, str, str], *, unmapped: bool) -> int:
    """Bytes of page cache in a cgroup that the kernel would take back first; with `unmapped` those that it would take
    back at all.
    """
    try:
        pairs = [line.split() for line in (cgroup / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    sizes = {pair[0]: int(pair[1]) for pair in pairs if pair and pair[0] in names}
    inactive, active, mapped = (sizes.get(name, 0) for name in names)
    return max(inactive, inactive + active - mapped) if unmapped else inactive


def _ulimits() -> Iterator[tuple[int, str]]:
    for number, name, letter, _ in LIMITS:
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit, f"{format_size(limit)} are the {name} that a process may have (ulimit -{letter})"


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", and if there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
