"""Where the tensors of a program lie while its operators are measured: in one arena, placed by their lifetimes as in a
run.

What an operator makes lives from the operator that writes it first to the one that reads it last, and shares its bytes
with what lives at other times: every round makes it anew. What no operator makes keeps its bytes, and so its contents,
for all rounds. Weights are windows in a pool of random numbers, at offsets that go round it, so that each has left the
cache when its turn comes.

Standard library only: bytes are counted before anything is started.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 64
WEIGHT_BUFFERS = 4
"""weights of one shape that the pool has room for, if there is memory for it"""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Bytes of the arena in which the weights of one dtype lie."""

    dtype: str
    offset: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Byte offsets of a program's tensors by name, but for those whose rows are gathered from a store."""

    offsets: Mapping[str, int]
    bytes: int
    """of the whole arena"""
    kept: tuple[str, ...]
    """tensors that no operator makes and that are no weights: their contents have to be given to them, once"""
    pools: tuple[Pool, ...]


@dataclass(frozen=True, kw_only=True)
class WeightsOfDtype:
    """The weights of a program that have one dtype."""

    dtype: str
    sizes: Mapping[str, int]
    """bytes by name, in the order of the program's values"""
    spread_bytes: int
    """bytes of a pool in which `WEIGHT_BUFFERS` weights of each shape lie side by side"""

    @property
    def largest(self) -> int:
        return max(self.sizes.values())


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(program: Mapping[str, Any], weight_bytes: int | None = None) -> Placement:
    """The places of a program's tensors (a profile's, as a dict). All pools together take `weight_bytes` at most where
    the largest weight of each dtype allows it; None: as many as `WEIGHT_BUFFERS` asks for.
    """
    values = {value["name"]: value for value in program["values"]}
    lives = lifetimes(program, values)
    weights = weights_of(program, values)
    used = _used(program)
    frozen = {name for group in weights for name in group.sizes}
    kept = tuple(name for name in values if name in used and name not in lives and name not in frozen)
    offsets, end = {}, 0
    for name in kept:
        offsets[name] = end
        end += aligned(values[name]["bytes"])
    pools = []
    wanted = sum(group.spread_bytes for group in weights)
    for group in weights:
        size = group.spread_bytes
        if weight_bytes is not None and weight_bytes < wanted:
            size = max(group.largest, size * weight_bytes // wanted // ALIGNMENT * ALIGNMENT)
        offsets.update(_windows(group, end, size))
        pools.append(Pool(dtype=group.dtype, offset=end, bytes=size))
        end += size
    sizes = {name: (aligned(values[name]["bytes"]), *life) for name, life in lives.items()}
    made = first_fit(sizes)
    offsets.update((name, end + offset) for name, offset in made.items())
    end += max((offset + sizes[name][0] for name, offset in made.items()), default=0)
    return Placement(offsets=offsets, bytes=end, kept=kept, pools=tuple(pools))


def first_fit(tensors: Mapping[str, tuple[int, int, int]]) -> dict[str, int]:
    """Offsets of tensors, each given as (bytes, first, last): the largest first, each at the lowest offset at which it
    overlaps none whose life, both ends included, meets its own.
    """
    placed: list[tuple[int, int, int, int]] = []  # (offset, end, first, last), by offset
    offsets = {}
    for name, (size, first, last) in sorted(tensors.items(), key=lambda item: (-item[1][0], item[1][1])):
        offset = 0
        for begin, end, begins, ends in placed:
            if begins <= last and ends >= first:
                if begin - offset >= size:
                    break
                offset = max(offset, end)
        offsets[name] = offset
        placed.append((offset, offset + size, first, last))
        placed.sort()
    return offsets


def lifetimes(program: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """(position of the operator that writes it first, position of the one that uses it last) of every tensor that
    operators make.

    Left out is what an operator reads before any has written it, and what has bytes between its elements, which no
    operator writes.
    """
    lives: dict[str, tuple[int, int]] = {}
    given = {value["name"] for value in values.values() if value["kind"] == "weight" or not _dense(value)}
    for position, operator in enumerate(program["operators"]):
        for name in operator["inputs"]:
            if name in lives:
                lives[name] = lives[name][0], position
            else:
                given.add(name)
        for name in operator["outputs"]:
            if name is not None and name not in given:
                lives[name] = lives.get(name, (position, position))[0], position
    return lives


def weights_of(program: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]]) -> list[WeightsOfDtype]:
    """The weights that operators read as a whole, by dtype."""
    used = _used(program)
    by_dtype: dict[str, dict[str, int]] = {}
    for name, value in values.items():
        if value["kind"] == "weight" and name in used:
            by_dtype.setdefault(value["dtype"], {})[name] = aligned(value["bytes"])
    groups = []
    for dtype, sizes in by_dtype.items():
        counts = Counter((tuple(values[name]["shape"]), size) for name, size in sizes.items())
        spread = sum(min(count, WEIGHT_BUFFERS) * size for (_, size), count in counts.items())
        groups.append(WeightsOfDtype(dtype=dtype, sizes=sizes, spread_bytes=spread))
    return groups


def _windows(group: WeightsOfDtype, start: int, size: int) -> dict[str, int]:
    """Offsets of weights, one behind the other in `size` bytes from `start` on, and again from the start at the end of
    them.
    """
    offsets, place = {}, 0
    for name, own in group.sizes.items():
        if place + own > size:
            place = 0
        offsets[name] = start + place
        place += own
    return offsets


def _used(program: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that are in memory while some operator runs."""
    used: set[str] = set()
    for operator in program["operators"]:
        used.update(name for name in operator["inputs"] if name not in operator["gathers"])
        used.update(filter(None, operator["outputs"]))
    return used


def _dense(value: Mapping[str, Any]) -> bool:
    elements = math.prod(value["shape"])
    steps: Iterable[tuple[int, int]] = zip(value["shape"], value["stride"])
    return not elements or 1 + sum((length - 1) * step for length, step in steps) == elements
