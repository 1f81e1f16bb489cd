"""What all pages share: scripts and styles (``charts.js``, ``components.js``, ``timeline.js``, ``charts.css``,
``style.css``), and the data that the charts draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from tightfit.planner.report.memory_categories import KINDS, UNKNOWN
from tightfit.planner.schema import Plan

SHARED = (
    "charts.css",
    "style.css",
    "charts.js",
    "lines.js",
    "components.js",
    "timeline.js",
    "glossary.js",
    "side_by_side.js",
    "run_report.js",
)
"""of this folder, what every page is made of"""


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
            if plan.fits
        ]
        misfits = [
            {"budget": plan.budget_bytes, "needs": plan.minimum_budget_bytes} for plan in policy_plans if not plan.fits
        ]
        if policy_plans:
            curves.append({"name": policy, "slot": slot, "points": points, "misfits": misfits})
    return curves
