"""A run that is done as one self-contained HTML page: what was predicted beside what was measured, loss and memory over
the steps, and the step of its plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.planner.report.html import describe
from tightfit.planner.report.plain_words import plain_words
from tightfit.planner.report.step_columns import has_columns, packed_columns
from tightfit.planner.report.templates import filled
from tightfit.planner.schema import Plan
from tightfit.runtime.common.units import format_seconds, format_size

ROWS = 200
"""steps listed, evenly spread"""
DRAWN = ("step", "loss", "resident_bytes", "peak_bytes")
"""figures of a step that the charts draw"""
PARTS = {
    "compute": "– computing",
    "recompute": "– of it again",
    "unpack": "– unpacking weights",
    "update": "– updating",
    "stall": "– waiting for transfers",
}
"""parts of a step's seconds, as the report has them"""
NOTHING = "–"


def run_page(
    name: str, report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], plan: Plan | None = None
) -> str:
    """HTML of the run called `name`: its `report`, the lines of its `metrics`, and its `plan` where that is at hand."""
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "eval_loss" in line]
    every = max(1, -(-len(steps) // ROWS))
    listed = [step for index, step in enumerate(steps) if index % every == 0 or index == len(steps) - 1]
    budget = format_size(report["budget_bytes"])
    return filled(
        "run.html.jinja",
        title=name if plan is None else f"{plan.model.name}: {name}",
        subtitle=f"{len(steps)} steps in {budget}"
        if plan is None
        else f"{describe(plan)}; {len(steps)} steps in {budget}",
        plain=[] if plan is None else plain_words(plan),
        enforced="the kernel" if report["enforced_by"] == "cgroup" else "the process's own meter",
        figures=_figures(report),
        every=every,
        steps={
            "headings": ["step", "loss", "seconds", "held now", "peak so far"],
            "rows": [_row(step) for step in listed],
        },
        drawn={
            "budget": report["budget_bytes"],
            "steps": [{figure: step[figure] for figure in DRAWN} for step in steps],
            "evaluations": [{"step": line["step"], "eval_loss": line["eval_loss"]} for line in evaluations],
            "plan": packed_columns(plan) if plan is not None and has_columns(plan) else None,
        },
    )


def _row(step: Mapping[str, Any]) -> list[str]:
    return [
        str(step["step"]),
        f"{step['loss']:.4f}",
        format_seconds(step["seconds"]),
        format_size(step["resident_bytes"]),
        format_size(step["peak_bytes"]),
    ]


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (figure, predicted, measured)."""
    peak, step = report["peak_bytes"], report["step_seconds"]
    rows = [("budget", format_size(report["budget_bytes"]), NOTHING), _sizes("peak of its processes", peak)]
    rows += [_sizes(f"– {name}", sizes) for name, sizes in report["processes"].items()]
    rows += [_sizes(f"stage before: {name}", sizes) for name, sizes in (report.get("stage_bytes") or {}).items()]
    rows.append(("one step", _told(step["predicted"], format_seconds), _told(step["measured"], format_seconds)))
    train = report["phases"]["train"]
    for part, label in PARTS.items():
        seconds = [(train.get(f"{kind}_seconds") or {}).get(part) for kind in ("predicted", "measured")]
        rows.append((label, _told(seconds[0], format_seconds), _told(seconds[1], format_seconds)))
    if tokens := report.get("tokens"):
        rows.append(("tokens a second, padding left out", NOTHING, f"{tokens['per_second']:.0f}"))
        rows.append(("padding", NOTHING, f"{tokens['padding_share']:.0%}"))
    for when, evaluation in report["evaluation"].items():
        rows.append((f"held-out loss {when}", NOTHING, f"{evaluation['loss']:.4f}"))
        if evaluation.get("accuracy") is not None:
            rows.append((f"accuracy {when}", NOTHING, f"{evaluation['accuracy']:.3f}"))
    if contention := report.get("contention"):
        steps = f"one step, in the {contention['steps']} steps during which other programs used cores"
        rows.append((steps, NOTHING, format_seconds(contention["step_seconds"])))
    return rows


def _sizes(name: str, sizes: Mapping[str, int | None]) -> tuple[str, str, str]:
    return (name, _told(sizes["predicted"], format_size), _told(sizes["measured"], format_size))


def _told(figure: Any, form: Any) -> str:
    return NOTHING if figure is None else str(form(figure))
