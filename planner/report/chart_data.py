"""What the charts of the pages are made of: their script and styles (``charts.js``, ``charts.css``), and the data they draw."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from tightfit.planner.report.memory_categories import KINDS, UNKNOWN, Bucket, feasible, in_use, kinds_of
from tightfit.planner.schema import Plan

SLICES = 260
"""slices of a step in a drawn timeline: finer than the picture's columns would not show"""


@cache
def chart_files() -> dict[str, str]:
    """The files that a page with charts needs, name -> text."""
    folder = files("tightfit.planner.report")
    script, styles = ((folder / name).read_text("utf-8") for name in ("charts.js", "charts.css"))
    return {"charts.js": script, "charts.css": styles + _kind_colours()}


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
    drawn = []
    for slot, policy in enumerate(policies):
        mine = sorted((plan for plan in plans if plan.policy == policy), key=lambda plan: plan.budget_bytes)
        points = [
            {
                "budget": plan.budget_bytes,
                "step": plan.step_seconds,
                "bound": plan.bound_seconds,
                "peak": plan.peak_bytes,
            }
            for plan in mine
            if feasible(plan)
        ]
        misfits = [
            {"budget": plan.budget_bytes, "needs": plan.minimum_budget_bytes} for plan in mine if not feasible(plan)
        ]
        if mine:
            drawn.append({"name": policy, "slot": slot, "points": points, "misfits": misfits})
    return drawn


def series_of(plan: Plan, shown: Sequence[Bucket]) -> dict[str, Any]:
    """What the timeline of a feasible plan draws: bytes of each kind in the slices `shown`, and which has the most in use."""
    assert plan.train is not None
    kinds = kinds_of((bucket.point for bucket in shown), plan.device.kind)
    used = [in_use(bucket.point) for bucket in shown]
    return {
        "seconds": plan.train.seconds or shown[-1].end,
        "starts": [bucket.start for bucket in shown],
        "ends": [bucket.end for bucket in shown],
        "total": [bucket.point.bytes for bucket in shown],
        "peak": used.index(max(used)),
        "kinds": [{"name": kind.name, "label": kind.label} for kind in kinds],
        "sizes": [[bucket.point.by_kind.get(kind.name, 0) for bucket in shown] for kind in kinds],
    }
