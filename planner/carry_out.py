"""Columns carried out: every layer's window joined, transfers moved into free memory, every tensor in its place."""

from __future__ import annotations

import time
from dataclasses import dataclass

from planner.arena import Arena, place
from planner.emit import Draft, Entry, draft, live_profile
from planner.layers import Layered
from planner.overlap import clock, overlap
from planner.windows import Column

ROUNDS = 3
"""limits that moved transfers are held to, one after the other, until everything finds its place in the arena"""
FEW = 200
"""an arena that is too large by less than one part in so many is not so because of what moved"""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Columns carried out, with every tensor in its place."""

    columns: tuple[Column, ...]
    draft: Draft
    train: tuple[Entry, ...]
    arena: Arena
    seconds: float
    stalls: float
    """seconds of them spent waiting for the disk"""
    peak_bytes: int
    """of the whole process"""


def carry_out(
    problem: Layered,
    columns: tuple[Column, ...],
    limit: int,
    *,
    deadline: float = float("inf"),
    unmoved: bool = False,
) -> tuple[Schedule | None, int]:
    """Schedule of the columns within `limit` bytes of arena and instructions, or the bytes by which it fails.

    With `unmoved` transfers stay where they are needed, at last, if nothing else fits.
    """
    joined = draft(problem, columns)
    room = limit - _charged(problem, joined)
    live = _live(joined)
    if live > room:
        return None, live - room
    excess, allowed = 0, room
    for attempt in range(ROUNDS):
        train = overlap(joined.train, problem.inputs, joined.resident, joined.sizes, allowed)
        arena = place(train, joined.evaluate, joined.resident, joined.sizes, room, deadline)
        before, excess = excess, arena.bytes - room
        if excess <= 0:
            return _schedule(problem, columns, joined, train, arena), excess
        # The arena has gaps: what is moved must leave room for them, if it is what makes them.
        allowed -= excess
        if time.monotonic() > deadline or excess < room // FEW or (attempt and excess > before / 2):
            break
    if unmoved:
        arena = place(joined.train, joined.evaluate, joined.resident, joined.sizes, room, deadline)
        excess = arena.bytes - room
        if excess <= 0:
            return _schedule(problem, columns, joined, joined.train, arena), excess
    return None, excess


def smallest_arena(problem: Layered, columns: tuple[Column, ...]) -> Schedule:
    """Schedule of the columns in the lowest arena found, with transfers moved as far as that allows."""
    joined = draft(problem, columns)
    arena = place(joined.train, joined.evaluate, joined.resident, joined.sizes, _live(joined))
    moved, _ = carry_out(problem, columns, arena.bytes + _charged(problem, joined))
    return moved or _schedule(problem, columns, joined, joined.train, arena)


def _charged(problem: Layered, joined: Draft) -> int:
    """Bytes of the instructions themselves."""
    return problem.profile.device.floor.instruction_bytes * (len(joined.train) + len(joined.evaluate))


def _live(joined: Draft) -> int:
    """Most bytes of live tensors in either schedule."""
    return max(
        max(live_profile(entries, joined.resident, joined.sizes), default=0)
        for entries in (joined.train, joined.evaluate)
    )


def _schedule(
    problem: Layered, columns: tuple[Column, ...], joined: Draft, train: tuple[Entry, ...], arena: Arena
) -> Schedule:
    timing = clock(train, problem.inputs)
    floor = problem.profile.device.floor
    peak = floor.resident_bytes + _charged(problem, joined) + arena.bytes + problem.workspace_bytes
    return Schedule(
        columns=columns,
        draft=joined,
        train=train,
        arena=arena,
        seconds=timing.seconds,
        stalls=timing.stalls,
        peak_bytes=max(peak, floor.import_peak_bytes),
    )
