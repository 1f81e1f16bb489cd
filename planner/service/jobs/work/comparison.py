"""The job that compares the plans of a profile at every budget by every policy on every device."""

from __future__ import annotations

from pathlib import Path

from tightfit.planner.compare import compare
from tightfit.planner.report.summary import plan_summary
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import PlanOptions
from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.jobs.work.inputs import profile_of
from tightfit.planner.service.jobs.work.keeping import keep_plan
from tightfit.planner.service.jobs.work.plan import finite
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.schema import OWN_DEVICE


def do(order: JobOrder, events: EventWriter) -> Row:
    """Plans of a profile at every budget by every policy on every device."""
    request = order.request
    objects = ObjectStore(Path(order.objects))
    plans_made = 0
    total = len(request["memory"]) * len(request["policies"]) * len(request["devices"])

    def planned(plan: Plan) -> None:
        nonlocal plans_made
        plans_made += 1
        figures = (
            "status",
            "budget_bytes",
            "policy",
            "peak_bytes",
            "step_seconds",
            "bound_seconds",
            "ended_by",
            "minimum_budget_bytes",
        )
        cell: Row = {"device": plan.device.name} | {name: getattr(plan, name) for name in figures}
        events.progress(always=True, stage="planning", done=plans_made, total=total, cell=cell)

    plans = compare(
        profile_of(order),
        request["memory"],
        request["policies"],
        devices=[None if name == OWN_DEVICE else name for name in request["devices"]],
        **PlanOptions.of(request).model_dump(exclude={"policy", "progress"}),
        planned=planned,
        solving=lambda figures: events.progress(**finite(figures), done=plans_made, total=total),
    ).plans
    files = [keep_plan(objects, order, plan, request["profile"]) for plan in plans]
    cells = [
        {
            "device": plan.device.name,
            "budget_bytes": plan.budget_bytes,
            "policy": plan.policy,
            "plan": file["id"],
            "summary": plan_summary(plan),
        }
        for plan, file in zip(plans, files, strict=True)
    ]
    return {"result": {"cells": cells}, "files": files}
