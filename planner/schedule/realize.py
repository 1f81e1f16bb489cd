"""Turns chosen columns into a schedule that fits: windows joined, transfers moved, every tensor placed in the arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.problem.gradients import Passages
from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.schedule.arena import ArenaLayout, Placed, arena_of, placed_items
from tightfit.planner.schedule.layer_schedule import Column
from tightfit.planner.schedule.lowering import Draft, DraftInstruction, draft, live_profile
from tightfit.planner.schedule.multi_layer_recompute import Segments
from tightfit.planner.schedule.prefetch import FreeBytes, Inputs, clock, facts_of, fast_orders, prefetch
from tightfit.planner.schedule.prefetch_in_place import prefetch_in_place
from tightfit.planner.search_options import ALL, SearchOptions
from tightfit.runtime.common.gc_pause import paused_collector

FREE = (0.03, 0.07)
"""shares of the arena that moved transfers must leave free for gaps; tried one after the other until all tensors find a
place
"""
BUFFERS = 2
"""trainables, beside the one that is updated, whose tensors may be on their way from or to the disk"""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule with every tensor in its place in the arena, and its figures."""

    problem: LayeredStep
    columns: tuple[Column, ...]
    draft: Draft
    train: tuple[DraftInstruction, ...]
    arena: ArenaLayout
    seconds: float
    stalls: float
    """seconds of them in which computation waits for the disk. Both include the share of an update that is apart"""
    peak_bytes: int
    """peak of the whole process"""
    segments: Segments = ()
    skipped: tuple[str, ...] = ()
    """layers whose backward is left out"""
    following: tuple[Schedule, ...] = ()
    """the steps after this one in a cycle; seconds and stalls are then the cycle's means, the peak its largest"""


@dataclass(frozen=True, kw_only=True)
class CyclePart:
    """One step of a policy's cycle: the part of the whole step that it computes, and its layers' decisions."""

    problem: LayeredStep
    columns: tuple[Column, ...]
    segments: Segments = ()
    skipped: tuple[str, ...] = ()
    passages: Passages = field(default_factory=dict)
    perturbed: tuple[str, ...] = ()

    @property
    def computing_seconds(self) -> float:
        """Seconds for which the cores are busy: those of the columns, and those of operators that segments run again to
        recompute their layers' inputs.
        """
        steps = self.problem.forward_steps
        again = [step for first, last in self.segments for layer in range(first, last) for step in steps[layer]]
        own = sum(column.core_seconds for column in self.columns)
        return own + sum(step.seconds for step in again)

    def draft(self) -> Draft:
        return draft(self.problem, self.columns, self.passages, self.perturbed, self.segments)


@paused_collector()
def realize(
    problem: LayeredStep,
    columns: tuple[Column, ...],
    limit: int,
    *,
    segments: Segments = (),
    options: SearchOptions = ALL,
    cutoff: Cutoff = NEVER,
) -> tuple[Schedule | None, int]:
    """A schedule of the columns within `limit` bytes of arena and instructions, or None and the bytes by which that
    fails. Raises TimeoutError where `cutoff` strikes.
    """
    part = CyclePart(problem=problem, columns=columns, segments=segments)
    drafted = part.draft()
    return _realize_draft(part, drafted, limit, _instruction_bytes(problem, [drafted]), cutoff, options=options)


def _realize_draft(
    part: CyclePart,
    drafted: Draft,
    limit: int,
    charged: int,
    cutoff: Cutoff,
    placed: Placed | None = None,
    options: SearchOptions = ALL,
) -> tuple[Schedule | None, int]:
    """The fastest schedule found of a draft within `limit`, of which `charged` bytes are for instructions: transfers
    are first moved with all the room; where that finds no arena, with less room (`FREE`), and last within the
    draft's own layout. The second result is the arena's bytes above (below: negative) the room for it. `placed`: the
    draft's layout, where it is known.
    """
    room = limit - charged
    facts = facts_of(drafted.train, frozenset(drafted.resident), drafted.sizes)
    beside = live_profile(drafted.beside, drafted.resident, drafted.sizes)
    live = max(int(np.max(facts.live, initial=0)), max(beside, default=0))
    if live > room:
        return None, live - room
    inputs = part.problem.inputs
    original = drafted
    if placed is None:
        drafted = replace(drafted, update=_prefetched_update(drafted, inputs, room))
    tried: list[list[int]] = []
    """the order of the drafted entries in each attempt"""

    def placed_in_order(order: list[int]) -> Schedule | None:
        train = tuple(drafted.train[index] for index in order)
        items, height = placed_items(train, drafted.beside, drafted.resident, drafted.sizes, room, cutoff, options)
        tried.append(order)
        if height > room:
            return None
        arena = arena_of(items, height, len(train), len(drafted.evaluate))
        return _schedule(part, drafted, train, arena, charged)

    for allowed in dict.fromkeys([room, *(max(live, int((1 - share) * room)) for share in FREE if options.spreading)]):
        for order, _ in fast_orders(facts, inputs, partial(FreeBytes, facts, allowed), cutoff):
            realized = None if order in tried else placed_in_order(order)
            if realized is not None:
                return realized, realized.arena.bytes - room
    # Moving transfers first has fragmented the arena: place the draft, and move transfers as far as its layout allows.
    train, arena = prefetch_in_place(drafted, inputs, room, cutoff, placed, options)
    if arena.bytes > room and drafted.update != original.update:
        drafted = original
        train, arena = prefetch_in_place(drafted, inputs, room, cutoff, placed, options)
    if arena.bytes > room:
        return None, arena.bytes - room
    return _schedule(part, drafted, train, arena, charged), arena.bytes - room


def _prefetched_update(step: Draft, inputs: Inputs, room: int) -> tuple[DraftInstruction, ...]:
    """The updates that are apart, with the tensors of the next trainable fetched while one is updated, and those of the
    one before written.
    """
    live = max(live_profile(step.update, step.resident, step.sizes), default=0)
    between = sum(step.sizes[name] for name in step.resident)
    return prefetch(step.update, inputs, step.resident, step.sizes, min(room, live + BUFFERS * (live - between)))


def smallest_arena(
    problem: LayeredStep, columns: tuple[Column, ...], cutoff: Cutoff = NEVER, options: SearchOptions = ALL
) -> Schedule:
    """A schedule of the columns in the smallest arena found, with transfers moved as far as its size allows."""
    return smallest_cycle([CyclePart(problem=problem, columns=columns)], cutoff, options)


@paused_collector()
def realize_cycle(parts: Sequence[CyclePart], limit: int, cutoff: Cutoff = NEVER) -> tuple[Schedule | None, int]:
    """Schedules of all steps of a policy's cycle within `limit` bytes of arena and all their instructions, or None and
    the bytes by which one of them fails. Raises TimeoutError where `cutoff` strikes.
    """
    drafts = [part.draft() for part in parts]
    charged = _instruction_bytes(parts[0].problem, drafts)
    schedules = []
    for part, drafted in zip(parts, drafts, strict=True):
        schedule, excess = _realize_draft(part, drafted, limit, charged, cutoff)
        if schedule is None:
            return None, excess
        schedules.append(schedule)
    return _in_turn(schedules), 0


def fewest_bytes(parts: Sequence[CyclePart]) -> int:
    """Bytes of arena and instructions that no schedules of these steps go below."""
    drafts = [part.draft() for part in parts]
    live = [
        max([*live_profile(entries, step.resident, step.sizes), 0])
        for step in drafts
        for entries in (step.train, step.beside)
    ]
    return max(live) + _instruction_bytes(parts[0].problem, drafts)


@paused_collector()
def smallest_cycle(parts: Sequence[CyclePart], cutoff: Cutoff = NEVER, options: SearchOptions = ALL) -> Schedule:
    """Schedules of all steps of a policy's cycle in the smallest arena found, with transfers moved as far as its size
    allows. Raises TimeoutError where `cutoff` strikes.
    """
    drafts = [part.draft() for part in parts]
    charged = _instruction_bytes(parts[0].problem, drafts)
    placed = [
        placed_items(step.train, step.beside, step.resident, step.sizes, cutoff=cutoff, options=options)
        for step in drafts
    ]
    limit = max(height for _, height in placed) + charged
    schedules = []
    for part, drafted, items in zip(parts, drafts, placed, strict=True):
        schedule, _ = _realize_draft(part, drafted, limit, charged, cutoff, items, options)
        assert schedule is not None
        schedules.append(schedule)
    return _in_turn(schedules)


def _in_turn(steps: Sequence[Schedule]) -> Schedule:
    """The steps of a cycle as one `Schedule`: the first, with the others in `following`."""
    first, *following = steps
    if not following:
        return first
    # Tensors that outlive a step must lie where the next step looks for them.
    assert all(step.arena.resident == first.arena.resident for step in following)
    assert all(set(step.draft.resident) == set(first.draft.resident) for step in following)
    height = max(step.arena.bytes for step in steps)
    return replace(
        first,
        arena=replace(first.arena, bytes=height),
        seconds=sum(step.seconds for step in steps) / len(steps),
        stalls=sum(step.stalls for step in steps) / len(steps),
        peak_bytes=max(step.peak_bytes for step in steps),
        following=tuple(following),
    )


def _instruction_bytes(problem: LayeredStep, drafts: Sequence[Draft]) -> int:
    """Bytes of the instructions themselves: those of every training step, of one evaluation, and of an update that is
    apart.
    """
    count = sum(len(step.train) for step in drafts) + len(drafts[0].beside)
    return problem.profile.device.floor.instruction_bytes * count


def _schedule(
    part: CyclePart, drafted: Draft, train: tuple[DraftInstruction, ...], arena: ArenaLayout, charged: int
) -> Schedule:
    problem = part.problem
    timing, apart = clock(train, problem.inputs), clock(drafted.update, problem.inputs)
    share = 1 / problem.profile.accumulate
    floor = problem.profile.device.floor
    peak = floor.held_bytes + charged + arena.bytes + problem.workspace_bytes
    return Schedule(
        problem=problem,
        columns=part.columns,
        segments=part.segments,
        skipped=part.skipped,
        draft=drafted,
        train=train,
        arena=arena,
        seconds=timing.seconds + share * apart.seconds,
        stalls=timing.stalls + share * apart.stalls,
        peak_bytes=max(peak, floor.start_peak_bytes),
    )
