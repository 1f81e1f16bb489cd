"""Assigns arena offsets: every tensor gets a fixed place for as long as it is resident, and no two overlap.

This is offline dynamic storage allocation: an item is a tensor with its intervals of residency (a tensor that is
resident across steps keeps one place for all of its intervals). Tensors resident all the time lie at the bottom;
`tightfit.planner.schedule.arena_placement` places the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.problem.step_graph import ALIGNMENT, PACKED_ALIGNMENT, aligned
from tightfit.planner.schedule.arena_placement import TensorLifetime, live_bytes, pack
from tightfit.planner.schedule.lowering import DraftInstruction, made_by
from tightfit.planner.search_options import ALL, SearchOptions

MOVES = {"spill", "fetch"}
DIRECT_BYTES = 64 << 10
"""Tensors of at least so many bytes that move between memory and disk are page-aligned, so that the disk reads and
writes them in place.
"""


@dataclass(frozen=True, kw_only=True)
class ArenaLayout:
    """The arena's size and where each tensor lies in it."""

    bytes: int
    resident: dict[str, int]
    """offsets of the tensors that are resident across steps"""
    train: dict[tuple[int, str], int]
    evaluate: dict[tuple[int, str], int]
    update: dict[tuple[int, str], int]
    """(index of the entry that makes it, tensor) -> offset"""


Placed = tuple[list[TensorLifetime], int]
"""(every tensor with its offset, bytes of arena that they take)"""


def placed_items(
    train: tuple[DraftInstruction, ...],
    beside: tuple[DraftInstruction, ...],
    resident: Iterable[str],
    sizes: dict[str, int],
    target: int = 0,
    cutoff: Cutoff = NEVER,
    options: SearchOptions = ALL,
) -> Placed:
    """Place every tensor in an arena of at most `target` bytes if such a layout is found; `target` 0: in the smallest
    found. `beside`: the schedules beside the training step, one after the other.

    The result may be larger than `target`: the caller has to check. Raises TimeoutError where `cutoff` strikes.
    """
    length = len(train) + len(beside)
    every = _items(train, beside, tuple(resident), sizes)
    # Tensors that are resident all the time lie at the bottom, those of the widest alignment first.
    permanent = [item for item in every if sum(last - first + 1 for first, last in item.spans) >= length]
    permanent.sort(key=lambda item: (-item.alignment, item.name))
    base = 0
    for item in permanent:
        item.offset = aligned(base, item.alignment)
        base = item.offset + item.size
    placed = {id(item) for item in permanent}
    items = [item for item in every if id(item) not in placed]
    height, offsets = pack(
        items, base, length, int(np.max(live_bytes(every, length), initial=0)), target, cutoff, options
    )
    for item, offset in zip(items, offsets):
        item.offset = offset
    return every, aligned(height)


def arena_of(items: Iterable[TensorLifetime], height: int, split: int, evaluated: int) -> ArenaLayout:
    """The items' offsets, indexed by the entry that makes each tensor. The first `split` entries are training's, the
    `evaluated` ones that follow those of an evaluation, and the rest of the update.
    """
    fixed: dict[str, int] = {}
    train: dict[tuple[int, str], int] = {}
    evaluate: dict[tuple[int, str], int] = {}
    update: dict[tuple[int, str], int] = {}
    for item in items:
        for maker in item.makers:
            if maker < 0:
                fixed[item.name] = item.offset
            elif maker < split:
                train[maker, item.name] = item.offset
            elif maker < split + evaluated:
                evaluate[maker - split, item.name] = item.offset
            else:
                update[maker - split - evaluated, item.name] = item.offset
    return ArenaLayout(bytes=height, resident=fixed, train=train, evaluate=evaluate, update=update)


def _items(
    train: tuple[DraftInstruction, ...],
    beside: tuple[DraftInstruction, ...],
    resident: tuple[str, ...],
    sizes: dict[str, int],
) -> list[TensorLifetime]:
    length = len(train) + len(beside)
    moved = {e.name for e in (*train, *beside) if e.verb in MOVES and sizes[e.name] >= DIRECT_BYTES}

    def item(name: str, spans: list[tuple[int, int]], maker: int) -> TensorLifetime:
        paged = name in moved or name.startswith("packed:")
        alignment = PACKED_ALIGNMENT if paged else ALIGNMENT
        return TensorLifetime(name=name, size=sizes[name], alignment=alignment, spans=spans, makers=[maker])

    always = {name: item(name, [], -1) for name in resident}
    items = list(always.values())

    def close(name: str, span: tuple[int, int], maker: int) -> None:
        if name in always:
            always[name].spans.append(span)
            if maker >= 0:
                always[name].makers.append(maker)
        else:
            items.append(item(name, [span], maker))

    for entries, base in ((train, 0), (beside, len(train))):
        open_spans = dict.fromkeys(resident, (base, -1))
        for index, entry in enumerate(entries, base):
            for name in made_by(entry):
                if name not in open_spans:
                    open_spans[name] = (index, index)
            if entry.verb == "free":
                start, maker = open_spans.pop(entry.name)
                close(entry.name, (start, index), maker)
        for name, (start, maker) in open_spans.items():
            close(name, (start, base + len(entries) - 1), maker)
    assert all(item.spans[-1][1] < length or length == 0 for item in items if item.spans)
    return [item for item in items if item.size]
