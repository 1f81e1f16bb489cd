"""A comparison as one self-contained HTML page: nothing is fetched, every chart has its table beside it.

`comparison_page` fills ``page.html.jinja``, beside this file, with records of plans; its charts are drawn by
``charts.js``, of data in the page.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tightfit.planner.problem.tensor_index import TensorIndex
from tightfit.planner.report.chart_data import curve_of, shared_files
from tightfit.planner.report.comparison_words import table_rows, verdicts
from tightfit.planner.report.diff import diff, grouped
from tightfit.planner.report.explain import nearness
from tightfit.planner.report.explanation import account
from tightfit.planner.report.memory_categories import (
    budgets_of,
    devices_of,
    kinds_of,
    policies_of,
    timeline_slices,
)
from tightfit.planner.report.step_columns import packed_columns
from tightfit.planner.report.summary import describe
from tightfit.planner.report.view import peak_view, words_view
from tightfit.planner.schema import Plan
from tightfit.profiles.devices.words import words_of
from tightfit.profiles.measuring.marks import caution
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import format_seconds, format_size, unit_of

MOMENTS = 24
"""slices of the table under a timeline"""
CHANGES = 300
"""changes listed in the difference of two plans; the rest are in the sums above them"""


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
    drawable = [plan for plan in ordered if plan.fits and plan.timeline]
    by_device = [[plan for plan in plans if plan.device.name == device] for device in devices]
    environment = Environment(
        loader=PackageLoader("tightfit.planner.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = format_size
    files = shared_files()
    return environment.get_template("page.html.jinja").render(
        styles="\n".join(text for name, text in files.items() if name.endswith(".css")),
        modules=_modules(files),
        title=f"{plans[0].model.name} on {plans[0].device.name if len(devices) == 1 else f'{len(devices)} devices'}",
        subtitle=describe(plans[0]),
        policies=names,
        devices=devices,
        budgets=budgets_of(plans),
        curves=[_curve(device_plans, names) for device_plans in by_device],
        plans=[_article(plan) for plan in drawable],
        drawn={
            "curves": [curve_of(device_plans, names) for device_plans in by_device],
            "timelines": [packed_columns(plan) for plan in drawable],
        },
        diff=_difference(drawable),
    )


def _modules(files: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """An import map of the scripts, each within the page: ``import … from "tightfit/charts.js"``."""
    imports = {}
    for name, text in files.items():
        if name.endswith(".js"):
            script = re.sub(r'from "\./(\w+\.js)"', r'from "tightfit/\1"', text)
            imports[f"tightfit/{name}"] = f"data:text/javascript;base64,{base64.b64encode(script.encode()).decode()}"
    return {"imports": imports}


def _curve(plans: Sequence[Plan], names: Sequence[str]) -> dict[str, Any]:
    """Time against memory on one device: verdicts and table."""
    plan, device = plans[0], plans[0].device
    if plan.model.is_bare_graph:
        where, measured = device.name, "as given"
        counted = "Budgets are on the bytes that are live; the graph's fixed bytes are inside."
    else:
        where, measured = device.name, "measured"
        if words_of(device).threaded:
            where = f"{device.threads} threads of {where}"
        floor = format_size(max(plan.floor_bytes for plan in plans))
        counted = f"Everything counts: {words_of(device).floor} ({floor}) is inside."
    return {
        "device": device.name,
        "device_text": f"{where}, times {measured if device.measured else 'estimated, not measured'}",
        "counted": counted,
        "caution": caution(device),
        "verdicts": verdicts(plans),
        "rows": table_rows(plans, names),
    }


def _article(plan: Plan) -> dict[str, Any]:
    """A feasible plan: what pages say of it, and the tables that stand in for its picture."""
    record, slices = account(plan), timeline_slices(plan.timeline, MOMENTS)
    step = plan.step_seconds
    return {
        "plan": plan,
        "unit": unit_of(plan.peak_bytes),
        "words": words_view(plan, record),
        "peak": peak_view(plan, record),
        "facts": facts(plan),
        "kinds": kinds_of(plan.timeline, plan.device.kind),
        "moments": slices,
        # three, and more where these would not tell the moments of the step apart
        "decimals": max(3, 2 - math.floor(math.log10(step))) if 0 < step < 1 else 3,
    }


def _difference(plans: Sequence[Plan]) -> dict[str, Any] | None:
    """The section on the difference of two plans, with the first two's changes; a script makes those of any other two
    out of what their timelines draw. None where there are fewer than two plans.
    """
    if len(plans) < 2:
        return None
    several = len(devices_of(plans)) > 1
    changes = diff(plans[0], plans[1])
    return {
        "labels": [
            f"{plan.policy} at {format_size(plan.budget_bytes)}" + (f" on {plan.device.name}" if several else "")
            for plan in plans
        ],
        "unit": unit_of(max(tensor.bytes for tensor in TensorIndex(plans[0]).tensors.values())),
        "groups": grouped(changes),
        "changes": changes[:CHANGES],
        "limit": CHANGES,
        "more": max(0, len(changes) - CHANGES),
    }


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
