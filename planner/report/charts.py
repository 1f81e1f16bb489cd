"""The two charts of the comparison page as inline SVG: step time against budget, and one plan's memory over its step.

Colours come from the page's custom properties (``--kind-weight``, ``--policy-0``), so that the dark ground needs no second
picture. Sizes are drawn in MiB, small ones in KiB or bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tightfit.planner.report.explanation import peak_text
from tightfit.planner.report.memory_categories import (
    Bucket,
    Kind,
    budgets_of,
    feasible,
    in_use,
    kinds_of,
    policies_of,
    ticks,
)
from tightfit.planner.schema import Plan
from tightfit.runtime.common.units import Unit, format_seconds, format_size, unit_of

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 22, 44
POLICY_SLOTS = 6


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear axis from data to picture units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def number(value: float) -> str:
    """An axis mark without needless zeros."""
    return f"{value:,.10g}"


def curve_svg(plans: Sequence[Plan]) -> str:
    """Seconds per step against the budget, a line per policy; the proven bound dashed; budgets that do not fit crossed."""
    budgets = budgets_of(plans)
    shown = [plan for plan in plans if feasible(plan)]
    unit = unit_of(budgets[-1])
    low, high = budgets[0] / unit.size, budgets[-1] / unit.size
    margin = (high - low) * 0.06 or high * 0.1
    x = Scale(low=low - margin, high=high + margin, start=LEFT, end=WIDTH - RIGHT)
    top = max((plan.step_seconds for plan in shown), default=1.0) * 1.12
    y = Scale(low=0.0, high=top, start=HEIGHT - BOTTOM, end=TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Seconds per step against the memory budget">',
        *_frame(y, "seconds per step"),
    ]
    for budget in _spread(budgets, x, unit):
        at = budget / unit.size
        parts.append(_text(x(at), HEIGHT - BOTTOM + 18, number(round(at, 1)), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, f"budget, {unit.name}", "middle", "axis"))
    bound = sorted((p.budget_bytes / unit.size, p.bound_seconds) for p in shown if p.policy == "solver")
    if len(bound) > 1:
        parts.append(f'<polyline class="bound" points="{_points(bound, x, y)}"/>')
    for slot, policy in enumerate(policies_of(plans)):
        mine = sorted((p for p in plans if p.policy == policy), key=lambda p: p.budget_bytes)
        parts.append(f'<g class="series" style="--c: var(--policy-{slot % POLICY_SLOTS})">')
        line = [(p.budget_bytes / unit.size, p.step_seconds) for p in mine if feasible(p)]
        if len(line) > 1:
            parts.append(f'<polyline points="{_points(line, x, y)}"/>')
        for plan in mine:
            parts.append(_mark(plan, x(plan.budget_bytes / unit.size), y, slot))
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def timeline_svg(plan: Plan, shown: Sequence[Bucket], name: str) -> str:
    """Memory over one training step, stacked by kind under the cap line; the instruction that sets the peak is marked."""
    assert plan.train is not None
    assert shown
    kinds = kinds_of((bucket.point for bucket in shown), plan.device.kind)
    peak = max(shown, key=lambda bucket: in_use(bucket.point))
    highest = max(bucket.point.bytes for bucket in shown)
    capped = plan.budget_bytes <= 1.7 * highest
    unit = unit_of(highest)
    top = max(highest, plan.budget_bytes if capped else 0) / unit.size * 1.08
    x = Scale(low=0.0, high=plan.train.seconds or shown[-1].end, start=LEFT, end=WIDTH - RIGHT)
    y = Scale(low=axis_start(kinds, shown, top, unit), high=top, start=HEIGHT - BOTTOM, end=TOP)
    parts = [
        (
            f'<svg class="chart timeline" id="{escape(name)}" viewBox="0 0 {WIDTH} {HEIGHT}" tabindex="0" role="group" '
            f'aria-label="Memory over one step of {escape(plan.policy)} at {format_size(plan.budget_bytes)}; '
            f'arrow keys move along the step">'
        ),
        *_frame(y, f"{unit.name}, from {number(y.low)} up" if y.low else unit.name),
    ]
    for tick in ticks(x.high):
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 18, number(tick), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "seconds into the step", "middle", "axis"))
    base = [int(y.low * unit.size)] * len(shown)
    above = [0] * len(shown)
    for kind in kinds:
        above = [low + bucket.point.by_kind.get(kind.name, 0) for low, bucket in zip(above, shown, strict=True)]
        parts.append(
            f'<path class="band" style="fill: var(--kind-{escape(kind.name)}, var(--kind-other))" d="{_band(shown, base, above, x, y, unit)}"/>'
        )
        base = above
    if capped:
        cap = y(plan.budget_bytes / unit.size)
        parts.append(f'<line class="cap" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{cap:.1f}" y2="{cap:.1f}"/>')
        parts.append(_text(LEFT + 6, cap - 5, f"cap {format_size(plan.budget_bytes)}", "start", "cap-label"))
    middle, height = x((peak.start + peak.end) / 2), y(in_use(peak.point) / unit.size)
    anchor = "end" if middle > WIDTH * 0.6 else "start"
    parts.append(
        f'<circle class="peak" cx="{middle:.1f}" cy="{height:.1f}" r="4.5"><title>{escape(peak_text(plan, plan.train))}</title></circle>'
    )
    parts.append(
        _text(
            middle + (-9 if anchor == "end" else 9),
            height + 16,
            f"fullest: {format_size(in_use(peak.point))} in use",
            anchor,
            "peak-label",
        )
    )
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>')
    return "".join(parts)


def axis_start(kinds: Sequence[Kind], shown: Sequence[Bucket], top: float, unit: Unit) -> float:
    """Where a memory axis in `unit` begins: zero, or just inside the floor where the floor would fill half of the picture."""
    floor = min(bucket.point.by_kind.get("floor", 0) for bucket in shown) / unit.size
    if floor < 0.4 * top or not kinds or kinds[0].name != "floor":
        return 0.0
    return max(0.0, floor - 0.12 * (top - floor)) // 10 * 10


def _frame(y: Scale, label: str) -> list[str]:
    parts = []
    for tick in ticks(y.high - y.low, start=y.low):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(LEFT - 8, y(tick) + 4, number(tick), "end"))
    parts.append(_text(LEFT - 8, TOP - 9, label, "start", "axis"))
    return parts


def _mark(plan: Plan, x: float, y: Scale, slot: int) -> str:
    where = f"{plan.policy} at {format_size(plan.budget_bytes)}"
    if not feasible(plan):
        needs = (
            f": needs {format_size(plan.minimum_budget_bytes, round_up=True)}"
            if plan.minimum_budget_bytes
            else ": does not fit"
        )
        # Crosses of several policies at one budget stand side by side.
        left, low = x - 4 + 10 * (slot - 1), HEIGHT - BOTTOM - 14
        return f'<path class="misfit" d="M{left:.1f} {low}l8 8m0 -8l-8 8"><title>{escape(where + needs)}</title></path>'
    told = f"{where}: {format_seconds(plan.step_seconds)} per step, peak {format_size(plan.peak_bytes)}"
    return f'<circle cx="{x:.1f}" cy="{y(plan.step_seconds):.1f}" r="4.5"><title>{escape(told)}</title></circle>'


def _band(shown: Sequence[Bucket], low: Sequence[int], high: Sequence[int], x: Scale, y: Scale, unit: Unit) -> str:
    up = [f"M{x(shown[0].start):.1f} {y(low[0] / unit.size):.1f}"]
    for bucket, value in zip(shown, high, strict=True):
        up.append(f"V{y(value / unit.size):.1f}H{x(bucket.end):.1f}")
    down = []
    for bucket, value in zip(reversed(shown), reversed(low), strict=True):
        down.append(f"V{y(value / unit.size):.1f}H{x(bucket.start):.1f}")
    return "".join([*up, *down, "Z"])


def _points(line: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)


def _spread(budgets: Sequence[int], x: Scale, unit: Unit) -> list[int]:
    """The budgets whose labels do not run into each other."""
    kept: list[int] = []
    for budget in budgets:
        if not kept or x(budget / unit.size) - x(kept[-1] / unit.size) >= 46:
            kept.append(budget)
    return kept


def _text(x: float, y: float, text: str, anchor: str, role: str = "tick") -> str:
    return f'<text class="{role}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
