"""Prefetching after placement: transfers are moved only as far as tensors that already have arena offsets leave gaps.

Close to the smallest budget every layout is fragmented, and a schedule whose transfers were moved by counting bytes
alone (`prefetch`) may have no layout that fits. Here the drafted schedule is placed first. A read is then issued
earlier only if some gap is free for the whole of its longer lifetime, and a spilled tensor stays longer only until
something else is made where it lies.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.problem.step_graph import aligned
from tightfit.planner.schedule.arena import ArenaLayout, Placed, arena_of, placed_items
from tightfit.planner.schedule.arena_placement import TensorLifetime
from tightfit.planner.schedule.free_ranges import ENDLESS
from tightfit.planner.schedule.lowering import Draft, DraftInstruction
from tightfit.planner.schedule.prefetch import FreeBytes, Inputs, ScheduleFacts, facts_of, fast_orders, target_of
from tightfit.planner.search_options import ALL, SearchOptions

STRIDE = 8
"""entries to skip, at least, before a read that found no gap is tried again"""
STRETCH = 64
"""entries after which spans that have ended are dropped from the list that is searched"""


def prefetch_in_place(
    draft: Draft,
    inputs: Inputs,
    room: int,
    cutoff: Cutoff = NEVER,
    placed: Placed | None = None,
    options: SearchOptions = ALL,
) -> tuple[tuple[DraftInstruction, ...], ArenaLayout]:
    """The draft's training schedule with transfers moved, and its layout, in an arena of `room` bytes. If the draft
    finds no layout within `room`, no transfer is moved and the layout is larger.

    `placed`: the draft's layout, where it is known. Raises TimeoutError where `cutoff` strikes.
    """
    items, height = placed or placed_items(
        draft.train, draft.beside, draft.resident, draft.sizes, room, cutoff, options=options
    )
    evaluated = len(draft.evaluate)
    if height > room or not options.moving_in_place:
        return draft.train, arena_of(items, height, len(draft.train), evaluated)
    facts = facts_of(draft.train, frozenset(draft.resident), draft.sizes)
    orders = fast_orders(facts, inputs, lambda: _FreeGaps(facts, items, room), cutoff)
    count = len(draft.train)
    if not orders:
        return draft.train, arena_of(items, height, count, evaluated)
    order, gaps = orders[0]
    moved = {drafted_index: position for position, drafted_index in enumerate(order)}
    for item in gaps.items:
        item.makers = [moved.get(maker, maker) for maker in item.makers]
    height = max((item.offset + item.size for item in gaps.items), default=0)
    return tuple(draft.train[index] for index in order), arena_of(gaps.items, aligned(height), count, evaluated)


class _FreeGaps(FreeBytes):
    """`FreeMemory` in terms of gaps between tensors placed in the arena. A span is one interval of residency, in
    drafted entries.
    """

    def __init__(self, facts: ScheduleFacts, items: Sequence[TensorLifetime], room: int) -> None:
        super().__init__(facts, room)
        self.room = room
        self.items = [copy.copy(item) for item in items]
        self.low = np.array([item.offset for item in items], dtype=np.int64)
        self.high = self.low + np.array([item.size for item in items], dtype=np.int64)
        spans = [(number, first, last) for number, item in enumerate(items) for first, last in item.spans]
        self.owner = np.array([number for number, _, _ in spans], dtype=np.int64)
        self.first = np.array([first for _, first, _ in spans], dtype=np.int64)
        self.last = np.array([last for _, _, last in spans], dtype=np.int64)
        self.made: dict[int, list[int]] = {}
        """drafted entry -> the spans that begin with it"""
        self.freed: dict[int, int] = {}
        """drafted entry that frees a tensor -> the span that ends with it"""
        ends: dict[tuple[str, int], int] = {}
        for span, (number, first, last) in enumerate(spans):
            self.made.setdefault(first, []).append(span)
            ends[items[number].name, last] = span
        for index, entry in enumerate(facts.entries):
            if entry.verb == "free" and (entry.name, index) in ends:
                self.freed[index] = ends[entry.name, index]
        always = np.array([max(item.makers) < 0 for item in items], dtype=bool)
        self.base = int(self.high[always].max(initial=0))
        """tensors that are resident across steps and made by no entry lie below it"""
        self.sorted = np.flatnonzero(~always[self.owner])
        """the other spans, sorted by first entry; refreshed, without those that have ended, every `STRETCH` entries"""
        self.begins = self.first[self.sorted]
        """first entry of each of them at that time"""
        self.looked = -1
        """entry from which on `sorted` is refreshed again"""
        self.early: list[int] = []
        """spans moved to an earlier first entry since `sorted` was refreshed"""
        self.waiting: set[int] = set()
        """spans of spilled tensors whose free is held back until they are written"""
        self.last_gap: tuple[int, int] | None = None
        """(the read last asked for, the offset of the gap that it fits into)"""

    def crowded(self, index: int) -> bool:
        if not self.waiting:
            return False
        made = [self.owner[span] for span in self.made.get(index, ())]
        held = [self.owner[span] for span in self.waiting]
        return any(self.low[new] < self.high[old] and self.low[old] < self.high[new] for new in made for old in held)

    def opens(self, at: int, index: int) -> int:
        opens = super().opens(at, index)
        if opens > index:
            return opens
        span = self._read(at)
        if span is None:
            self.last_gap = at, 0
            return index
        number = self.owner[span]
        item = self.items[number]
        # A tensor that is resident across steps keeps its offset, where the next step looks for it.
        fixed = len(item.spans) > 1 or item.makers[0] < 0
        until = at - 1 if fixed else self.last[span]
        near = self._near(index, until)
        near = near[near != span]
        low, high = self.low[self.owner[near]], self.high[self.owner[near]]
        if fixed:
            free = not ((low < self.high[number]) & (high > self.low[number])).any()
            offset = item.offset
        else:
            offset = _tightest_gap(low, high, self.base, item.size, item.alignment)
            free = offset + item.size <= self.room
        if not free:
            # No gap opens before the first of these spans ends; and trying again within `STRIDE` entries is hardly
            # worth it.
            return max(int(self.last[near].min()) + 1, index + STRIDE)
        self.last_gap = at, offset
        return index

    def take(self, at: int, index: int) -> None:
        super().take(at, index)
        span = self._read(at)
        if span is None or index == at:
            return
        assert self.last_gap is not None
        assert self.last_gap[0] == at
        number = self.owner[span]
        self.first[span] = index
        self.early.append(span)
        self.items[number].offset = self.last_gap[1]
        self.low[number] = self.last_gap[1]
        self.high[number] = self.last_gap[1] + self.items[number].size
        self.made[at].remove(span)

    def hold(self, index: int) -> None:
        super().hold(index)
        span = self.freed.get(index)
        if span is not None:
            self.waiting.add(span)
            self.last[span] = ENDLESS

    def give(self, index: int, now: int) -> None:
        super().give(index, now)
        span = self.freed.get(index)
        if span is not None:
            self.waiting.discard(span)
            self.last[span] = max(index, now - 1)

    def _near(self, index: int, until: int) -> npt.NDArray[np.int64]:
        """Spans that overlap the entries from `index` to `until`. From call to call `index` never decreases."""
        if index >= self.looked:
            self.looked = index + STRETCH
            unended = self.sorted[self.last[self.sorted] >= index]
            self.sorted = unended[np.argsort(self.first[unended], kind="stable")]
            self.begins = self.first[self.sorted]
            self.early = []
        near = self.sorted[: np.searchsorted(self.begins, until, side="right")]
        near = np.concatenate([near, np.array(self.early, dtype=np.int64)])
        return near[self.last[near] >= index]

    def _read(self, at: int) -> int | None:
        """The span that begins with the read at `at`; None for a tensor of no bytes."""
        target = target_of(self.facts.entries[at])
        return next((span for span in self.made.get(at, ()) if self.items[self.owner[span]].name == target), None)


def _tightest_gap(low: npt.NDArray[np.int64], high: npt.NDArray[np.int64], base: int, size: int, alignment: int) -> int:
    """Offset of the smallest gap of at least `size` bytes, from `base` up, between the ranges [low, high), or above
    them all.

    As `tightfit.planner.schedule.free_ranges.gap` with `tight`, vectorised for hundreds of ranges in any order.
    """
    order = np.argsort(low)
    start = np.maximum.accumulate(np.concatenate([[base], high[order]]))
    start += -start % alignment
    free = low[order] - start[:-1]
    fits = np.flatnonzero(free >= size)
    return int(start[fits[np.argmin(free[fits])]] if fits.size else start[-1])
