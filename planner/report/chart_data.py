"""What all pages share: scripts and styles (``charts.js``, ``components.js``, ``timeline.js``, ``charts.css``, ``style.css``), and the
data that the charts draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from tightfit.planner.fleet.schema import Member, PipelinePlan, Span
from tightfit.planner.report.fleet_text import DOING, AnyPlan
from tightfit.planner.report.memory_categories import KINDS, UNKNOWN, TimelineSlice, feasible, in_use, kinds_of
from tightfit.planner.schema import Plan

SLICES = 260
"""slices of a step in a drawn timeline: finer than the picture's columns would not show"""
WIDE = 200
"""micro-batches shorter than this fraction of a fleet's step are drawn as one bar"""
NARROW = 3
"""an exchange that takes less than this fraction of a fleet's step is drawn once more, enlarged"""


SHARED = ("charts.css", "style.css", "charts.js", "lines.js", "components.js", "timeline.js", "glossary.js")


@cache
def shared_files() -> dict[str, str]:
    """The files that every page needs, name -> text."""
    folder = files("tightfit.planner.report")
    texts = {name: (folder / name).read_text("utf-8") for name in SHARED}
    return texts | {"charts.css": texts["charts.css"] + _kind_colours()}


def _kind_colours() -> str:
    """The colours of what memory is spent on, the same as in every other picture."""
    light, dark = (
        "".join(f"--kind-{kind.name}: {getattr(kind, ground)}; " for kind in KINDS) + f"--kind-other: {UNKNOWN[index]};"
        for index, ground in enumerate(("light", "dark"))
    )
    return (
        f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {dark} }} }}\n"
        f":root[data-theme=dark] {{ {dark} }}\n"
    )


def curve_of(plans: Sequence[Plan], policies: Sequence[str]) -> list[dict[str, Any]]:
    """What the curve of one device's `plans` draws: for each policy the plans that fit, and the budgets that do not.

    A policy has the colour of its place in `policies`.
    """
    curves = []
    for slot, policy in enumerate(policies):
        policy_plans = sorted((plan for plan in plans if plan.policy == policy), key=lambda plan: plan.budget_bytes)
        points = [
            {
                "budget": plan.budget_bytes,
                "step": plan.step_seconds,
                "bound": plan.bound_seconds,
                "peak": plan.peak_bytes,
            }
            for plan in policy_plans
            if feasible(plan)
        ]
        misfits = [
            {"budget": plan.budget_bytes, "needs": plan.minimum_budget_bytes}
            for plan in policy_plans
            if not feasible(plan)
        ]
        if policy_plans:
            curves.append({"name": policy, "slot": slot, "points": points, "misfits": misfits})
    return curves


def series_of(plan: Plan, slices: Sequence[TimelineSlice]) -> dict[str, Any]:
    """What the timeline of a feasible plan draws: bytes of each kind in its `slices`, and which slice has the most in use."""
    assert plan.train is not None
    kinds = kinds_of((slice_.point for slice_ in slices), plan.device.kind)
    used_bytes = [in_use(slice_.point) for slice_ in slices]
    return {
        "seconds": plan.train.seconds or slices[-1].end,
        "starts": [slice_.start for slice_ in slices],
        "ends": [slice_.end for slice_ in slices],
        "total": [slice_.point.bytes for slice_ in slices],
        "peak": used_bytes.index(max(used_bytes)),
        "kinds": [{"name": kind.name, "label": kind.label} for kind in kinds],
        "sizes": [[slice_.point.by_kind.get(kind.name, 0) for slice_ in slices] for kind in kinds],
    }


def lanes_of(fleet: AnyPlan) -> dict[str, Any]:
    """What the picture of a fleet's step draws: a lane for each device and each link, with bars of what it does.

    The lanes of the links between two devices lie between theirs. `first` and `last` are numbers of micro-batches,
    `exchange` the second at which all have computed, where what follows is to be drawn enlarged.
    """
    by_lane: dict[str, list[Span]] = {}
    for span in sorted(fleet.timeline, key=lambda span: (span.begin_seconds, span.end_seconds)):
        by_lane.setdefault(span.lane, []).append(span)
    names = [member.name for member in fleet.members]
    shares = {} if isinstance(fleet, PipelinePlan) else {member.name: member for member in fleet.members}
    lanes = []
    for lane in sorted(by_lane, key=lambda lane: _place(lane, names)):
        spans, kind = by_lane[lane], "device" if lane in names else "link"
        computing = [span for span in spans if span.what == "compute"]
        bars = [
            _bar(span.what, span.begin_seconds, span.end_seconds, span.micro_batch, span.micro_batch)
            for span in spans
            if span.what != "compute"
        ]
        if computing:
            bars = _micro_batches(shares[lane], computing, fleet.makespan_seconds) + bars
        lanes.append({"name": lane, "kind": kind, "bars": bars})
    done = {span.what for span in fleet.timeline}
    kinds = [{"name": what, "label": label} for what, label in DOING.items() if what in done]
    whole = fleet.makespan_seconds
    exchange = None
    if not isinstance(fleet, PipelinePlan) and len(fleet.chain) > 1:
        begin = fleet.compute_seconds
        exchange = begin if (whole - begin) * NARROW < whole else None
    return {"seconds": whole, "exchange": exchange, "kinds": kinds, "lanes": lanes}


def _place(lane: str, names: Sequence[str]) -> tuple[float, int]:
    """Where a lane stands: a device at its number, a link between its two ends, upwards first."""
    ends = [names.index(end) for end in lane.split(" → ")]
    return (sum(ends) / len(ends), ends[0])


def _micro_batches(member: Member, spans: Sequence[Span], whole: float) -> list[dict[str, Any]]:
    """A bar for each micro-batch of a member, which follow each other and take equally long; one for all where these
    would be too narrow.
    """
    begin, end = spans[0].begin_seconds, max(span.end_seconds for span in spans)
    number = member.micro_batches
    each = (end - begin) / number
    if each * WIDE < whole:
        return [_bar("compute", begin, end, member.first, member.first + number - 1)]
    return [
        _bar("compute", begin + k * each, begin + (k + 1) * each, member.first + k, member.first + k)
        for k in range(number)
    ]


def _bar(what: str, begin: float, end: float, first: int | None = None, last: int | None = None) -> dict[str, Any]:
    return {"what": what, "begin": begin, "end": end, "first": first, "last": last}
