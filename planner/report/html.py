"""A comparison as one self-contained HTML page: nothing is fetched, every chart has its table beside it.

`comparison_page` turns plans into text; the page's markup and script are ``page.html.jinja`` beside this file. Its
charts are drawn by ``charts.js``, of data in the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.planner.report.chart_data import SLICES, curve_of
from tightfit.planner.report.explain import explain, nearness
from tightfit.planner.report.explanation import peak_text
from tightfit.planner.report.html_diff import diff_section
from tightfit.planner.report.memory_categories import (
    TimelineSlice,
    budgets_of,
    devices_of,
    feasible,
    kinds_of,
    peak_parts,
    policies_of,
    timeline_slices,
)
from tightfit.planner.report.plain_words import plain_words
from tightfit.planner.report.step_columns import packed_columns
from tightfit.planner.report.summary import adapter_words, update_words
from tightfit.planner.report.templates import filled
from tightfit.planner.schema import Plan
from tightfit.planner.solve.policies import APPROXIMATE
from tightfit.profiles.devices.words import words_of
from tightfit.profiles.measuring.marks import caution
from tightfit.profiles.schema import MOBILLM
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import format_seconds, format_size, unit_of

MOMENTS = 24
"""slices of the table under a timeline"""
LARGEST = 12
"""tensors listed at the peak"""


def comparison_page(plans: Sequence[Plan]) -> str:
    """HTML of a comparison of `plans` of one model, on any devices, by any policies, at any budgets.

    Raises InputError without plans.
    """
    if not plans:
        raise InputError("there are no plans to compare; name at least one budget and one policy")
    names, devices = policies_of(plans), devices_of(plans)
    ordered = sorted(
        plans, key=lambda plan: (devices.index(plan.device.name), names.index(plan.policy), plan.budget_bytes)
    )
    articles, timelines = [], []
    for plan in ordered:
        slices = timeline_slices(plan.timeline, SLICES)
        if feasible(plan) and plan.train is not None and slices:
            articles.append(_article(plan, slices))
            timelines.append(packed_columns(plan))
    by_device = [[plan for plan in plans if plan.device.name == device] for device in devices]
    where = plans[0].device.name if len(devices) == 1 else f"{len(devices)} devices"
    return filled(
        "page.html.jinja",
        title=f"{plans[0].model.name} on {where}",
        subtitle=describe(plans[0]),
        policies=names,
        devices=devices,
        budgets=[{"bytes": budget, "text": format_size(budget)} for budget in budgets_of(plans)],
        curves=[_curve(device_plans, names) for device_plans in by_device],
        plans=articles,
        drawn={"curves": [curve_of(device_plans, names) for device_plans in by_device], "timelines": timelines},
        diff=diff_section(ordered),
    )


def _curve(plans: Sequence[Plan], names: Sequence[str]) -> dict[str, Any]:
    """Time against memory on one device: verdicts and table."""
    device = plans[0].device
    return {
        "device": device.name,
        "device_text": _device(plans[0]),
        "counted": _counted(plans),
        "caution": caution(plans[0].device),
        "verdicts": verdicts(plans),
        "rows": _rows(plans, names),
    }


def _counted(plans: Sequence[Plan]) -> str:
    """What the budgets limit, in words."""
    if plans[0].model.is_bare_graph:
        return "Budgets are on the bytes that are live; the graph's fixed bytes are inside."
    return (
        f"Everything counts: {words_of(plans[0].device).floor} ({format_size(max(plan.floor_bytes for plan in plans))})"
        " is inside."
    )


def _device(plan: Plan) -> str:
    device = plan.device
    if plan.model.is_bare_graph:
        return f"{device.name}, times {'as given' if device.measured else 'estimated, not measured'}"
    where = f"{device.threads} threads of {device.name}" if words_of(device).threaded else device.name
    return f"{where}, times {'measured' if device.measured else 'estimated, not measured'}"


def describe(plan: Plan) -> str:
    """What is trained, in a line: shapes, number type, LoRA rank, what updates where it is not AdamW alone."""
    if plan.model.is_bare_graph:
        return f"a bare graph of {len(plan.programs[0].operators)} operators; budgets are on the bytes that are live"
    shape = f"batch {plan.batch}" + (f", sequence {plan.seq}" if plan.seq else "")
    adapted = adapter_words(plan.model.lora) if plan.model.lora and "rank" in plan.model.lora else "all parameters"
    if plan.policy == MOBILLM:
        adapted = "nothing trained here"
    updates = update_words(plan)
    return f"{adapted}, {shape}, {plan.compute_dtype}{f', {updates}' if updates else ''}"


def verdicts(plans: Sequence[Plan]) -> list[str]:
    """A sentence per budget of one device: the solver's step beside the best fixed rule that fits the same budget."""
    sentences = []
    rules = [name for name in policies_of(plans) if name not in {"solver", MOBILLM, *APPROXIMATE}]
    for budget in budgets_of(plans):
        fixed = {plan.policy: plan for plan in plans if plan.budget_bytes == budget}
        solved = fixed.pop("solver", None)
        if solved is None or not feasible(solved):
            continue
        text = f"{format_size(budget)}: {format_seconds(solved.step_seconds)} per step, {nearness(solved, 'class')}"
        sentences.append(f"{text}{_beside_rules(solved, fixed, [name for name in rules if name not in fixed])}.")
    return sentences


def _beside_rules(solved: Plan, by_policy: Mapping[str, Plan], missing: Sequence[str]) -> str:
    """How the solver's step compares with the fixed rules planned for the same budget; `missing` were not, being
    interrupted.
    """
    if not by_policy:
        return f"; {', '.join(missing)} not planned" if missing else ""
    fitting = [plan for plan in by_policy.values() if feasible(plan)]
    exact = [plan for plan in fitting if plan.exact]
    unplanned = f" ({', '.join(missing)} not planned)" if missing else ""
    if exact:
        best = min(exact, key=lambda plan: plan.step_seconds)
        needs = (
            f"{best.step_seconds / solved.step_seconds:.2f} × as long"
            if solved.step_seconds
            else format_seconds(best.step_seconds)
        )
        return f"; {best.policy}, the fastest fixed rule that fits{unplanned}, needs {needs}"
    if fitting:
        names = " and ".join(plan.policy for plan in fitting)
        single = len(fitting) == 1
        return (
            f"; {names} {'fits' if single else 'fit'} but {'does' if single else 'do'} not follow the exact gradient,"
            f" so {'its time is' if single else 'their times are'} no measure{unplanned}"
        )
    return f"; no fixed rule compared here fits{unplanned}"


def _rows(plans: Sequence[Plan], names: Sequence[str]) -> list[dict[str, Any]]:
    by_cell = {(plan.budget_bytes, plan.policy): plan for plan in plans}
    rows = []
    for budget in budgets_of(plans):
        row = [by_cell.get((budget, name)) for name in names]
        times = [plan.step_seconds for plan in row if plan and feasible(plan)]
        rows.append({"budget": format_size(budget), "cells": [_cell(plan, min(times, default=0.0)) for plan in row]})
    return rows


def _cell(plan: Plan | None, best: float) -> dict[str, str]:
    if plan is None:
        return {"text": "–", "role": ""}
    if not feasible(plan):
        smallest = plan.minimum_budget_bytes
        return {"text": f"needs {format_size(smallest, round_up=True)}" if smallest else "does not fit", "role": "none"}
    return {"text": format_seconds(plan.step_seconds), "role": "best" if plan.step_seconds <= 1.005 * best else ""}


def _article(plan: Plan, slices: Sequence[TimelineSlice]) -> dict[str, Any]:
    assert plan.train is not None
    kinds = kinds_of((slice_.point for slice_ in slices), plan.device.kind)
    unit = unit_of(plan.peak_bytes)
    return {
        "policy": plan.policy,
        "device": plan.device.name,
        "budget_bytes": plan.budget_bytes,
        "budget": format_size(plan.budget_bytes),
        "kinds": kinds,
        "peak_text": peak_text(plan, plan.train),
        "unit": unit.name,
        "peak_size": unit.amount(plan.peak_bytes),
        "parts": [
            {
                "name": kind.name,
                "label": kind.label,
                "size": unit.amount(size),
                "share": f"{size / plan.peak_bytes:.0%}",
            }
            for kind, size in peak_parts(plan)
        ],
        "facts": facts(plan),
        "plain": plain_words(plan),
        "words": explain(plan),
        "moments": [
            [f"{slice_.start:.{_decimals(plan.step_seconds)}f}", unit.amount(slice_.point.bytes)]
            + [unit.amount(slice_.point.by_kind.get(kind.name, 0)) for kind in kinds]
            for slice_ in timeline_slices(plan.timeline, MOMENTS)
        ],
        "largest": [
            (tensor, unit.amount(size, 2))
            for tensor, size in sorted(plan.train.peak.tensors.items(), key=lambda item: -item[1])[:LARGEST]
        ],
    }


def _decimals(step: float) -> int:
    """Of seconds in a step that takes `step`: three, and more where these would not tell its moments apart."""
    return max(3, 2 - math.floor(math.log10(step))) if 0 < step < 1 else 3


def facts(plan: Plan) -> list[tuple[str, str]]:
    """The figures of one feasible plan in words."""
    train = plan.train
    assert train is not None
    rows = [
        ("status", plan.status if plan.policy != "solver" else nearness(plan, "class")),
        *([("step, as rehearsed", format_seconds(plan.expected_seconds))] if plan.expected_from == "rehearsal" else []),
        ("step, by the model", format_seconds(plan.step_seconds)),
        ("no faster in this class than", f"{format_seconds(plan.bound_seconds)} (gap {plan.gap:.2%})"),
        (
            "no schedule at all faster than",
            f"{format_seconds(plan.any_schedule_bound_seconds)} (gap {plan.any_schedule_gap:.1%})",
        ),
        ("solved in", f"{plan.solve_seconds:.1f} s"),
        ("forward and backward", format_seconds(train.compute_seconds)),
        ("recomputation", format_seconds(train.recompute_seconds)),
        ("unpacking", format_seconds(train.unpack_seconds)),
        ("waiting for the disk", format_seconds(train.stall_seconds)),
        ("read per step", format_size(train.read_bytes)),
        ("written per step", format_size(train.write_bytes)),
    ]
    return rows if plan.policy == "solver" else [row for row in rows if not row[0].startswith(("no faster", "solved"))]
