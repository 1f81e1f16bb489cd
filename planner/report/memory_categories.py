"""The kinds of memory use: their order, labels and colours, shared by every table and picture, and sums by kind."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from tightfit.planner.schema import Plan, TimelinePoint


@dataclass(frozen=True, kw_only=True)
class MemoryBand:
    """One band of the stacked memory timeline, bottom first."""

    name: str
    label: str
    light: str
    """colour on a light ground"""
    dark: str
    """colour on a dark ground"""


KINDS = (
    MemoryBand(name="floor", label="Python and PyTorch", light="#b9bec6", dark="#59616b"),
    MemoryBand(name="constant", label="constants", light="#8a94a3", dark="#7d8897"),
    MemoryBand(name="batch", label="batch", light="#5f6b7c", dark="#a3aebd"),
    MemoryBand(name="trainable", label="trainables", light="#e3a008", dark="#e0a92e"),
    MemoryBand(name="optimizer", label="optimizer state", light="#e4692f", dark="#e57a45"),
    MemoryBand(name="packed", label="weights, packed", light="#2563c4", dark="#4b86e0"),
    MemoryBand(name="weight", label="weights, unpacked", light="#6cb2f0", dark="#8cc4f7"),
    MemoryBand(name="activation", label="activations", light="#5b3fb5", dark="#8f76e0"),
    MemoryBand(name="gradient", label="gradients", light="#d65a94", dark="#e07aa9"),
    MemoryBand(name="workspace", label="workspace", light="#12866b", dark="#2fa98a"),
    MemoryBand(name="fragmentation", label="empty, kept for reuse", light="#d8d2c4", dark="#6d675b"),
    MemoryBand(name="start", label="start of Python and PyTorch", light="#cfd3d9", dark="#454c55"),
    MemoryBand(name="beyond", label="at other moments", light="#a89f92", dark="#8a8175"),
)
UNKNOWN = ("#77706a", "#9a938c")


@dataclass(frozen=True, kw_only=True)
class TimelineSlice:
    """One slice of the step, represented by its point with most bytes in use."""

    start: float
    end: float
    """seconds"""
    point: TimelinePoint


def kinds_of(timeline: Iterable[TimelinePoint], on: str = "cpu") -> list[MemoryBand]:
    """The kinds that take any memory in `timeline` of a plan for a device of kind `on`, in stacking order; kinds this
    module does not know come last.
    """
    return bands({name for point in timeline for name, size in point.by_kind.items() if size > 0}, on)


def bands(names: Collection[str], on: str = "cpu") -> list[MemoryBand]:
    """The bands of kinds of memory, in stacking order, as a plan for a device of kind `on` calls them."""
    known = [kind for kind in KINDS if kind.name in names]
    if on == "cuda":
        card = {"floor": "CUDA context", "start": "start of the CUDA context"}
        known = [replace(kind, label=card.get(kind.name, kind.label)) for kind in known]
    others = sorted(set(names) - {kind.name for kind in KINDS})
    return known + [MemoryBand(name=name, label=name, light=UNKNOWN[0], dark=UNKNOWN[1]) for name in others]


def timeline_slices(timeline: Sequence[TimelinePoint], count: int) -> list[TimelineSlice]:
    """At most `count` slices of equal length; each shows its fullest point, so that no peak is lost.

    A point holds from the end of the one before it to its own `seconds`. Slices that would repeat their neighbour are
    merged into it.
    """
    if not timeline:
        return []
    length = timeline[-1].seconds / count
    fullest: list[TimelinePoint | None] = [None] * count
    before = 0.0
    for point in timeline:
        first = min(count - 1, int(before / length)) if length > 0 else 0
        # A point that ends on a slice's edge does not reach into the next slice.
        last = min(count - 1, max(first, int(point.seconds / length - 1e-9))) if length > 0 else 0
        for index in range(first, last + 1):
            fullest_so_far = fullest[index]
            if fullest_so_far is None or in_use(point) > in_use(fullest_so_far):
                fullest[index] = point
        before = point.seconds
    merged: list[TimelineSlice] = []
    for index, top in enumerate(fullest):
        if top is None:
            continue
        end = (index + 1) * length
        if merged and merged[-1].point.by_kind == top.by_kind and merged[-1].point.bytes == top.bytes:
            merged[-1] = TimelineSlice(start=merged[-1].start, end=end, point=merged[-1].point)
        else:
            merged.append(TimelineSlice(start=index * length, end=end, point=top))
    # Exactly the step's end, despite rounding and where slices are so short that their length rounds to 0.
    merged[-1] = replace(merged[-1], end=timeline[-1].seconds)
    return merged


def in_use(point: TimelinePoint) -> int:
    """Bytes in use at a point: those of the process less pages that it once touched and that hold nothing now."""
    return point.bytes - point.by_kind.get("fragmentation", 0)


def fullest(timeline: Iterable[TimelinePoint]) -> TimelinePoint | None:
    """The first point with the most bytes in use: what sets the peak."""
    return max(timeline, key=in_use, default=None)


def peak_parts(plan: Plan) -> list[tuple[MemoryBand, int]]:
    """Bytes of each kind at the peak of `plan`, in stacking order; together its `peak_bytes`.

    They are what the instruction with most bytes in use holds, what other instructions make the process hold beyond
    that, and by how much the start of the process exceeds both.
    """
    point = fullest(plan.timeline)
    if point is None:
        return []
    # The process keeps room for the largest workspace, whichever operator needs it.
    beyond = max(0, plan.peak_bytes - plan.start_bytes - point.bytes)
    workspace = point.by_kind.get("workspace", 0)
    largest = min(workspace + beyond, max(workspace, plan.workspace_bytes))
    by_kind = {
        **point.by_kind,
        "workspace": largest,
        "start": plan.start_bytes,
        "beyond": beyond - (largest - workspace),
    }
    kinds = kinds_of([point.model_copy(update={"by_kind": by_kind})], plan.device.kind)
    return [(kind, by_kind[kind.name]) for kind in kinds]


def policies_of(plans: Iterable[Plan]) -> list[str]:
    """Policies in order of first appearance, the solver first."""
    names = list(dict.fromkeys(plan.policy for plan in plans))
    return sorted(names, key=lambda name: name != "solver")


def devices_of(plans: Iterable[Plan]) -> list[str]:
    """Names of the devices in order of first appearance."""
    return list(dict.fromkeys(plan.device.name for plan in plans))


def budgets_of(plans: Iterable[Plan]) -> list[int]:
    """Budgets in bytes, smallest first."""
    return sorted({plan.budget_bytes for plan in plans})
