"""The jobs that make plans and comparisons; each returns its result and the files it made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tightfit.planner.compare import compare
from tightfit.planner.generation.choice import ChoiceProblem
from tightfit.planner.generation.program import choose_each
from tightfit.planner.plan import planner_of
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.report.marginal_value import explained
from tightfit.planner.report.summary import plan_summary
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import SOLVER, PlanOptions
from tightfit.planner.service.jobs.keeping import keep_plan
from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.schema import OWN_DEVICE
from tightfit.profiles.io import parse_profile
from tightfit.profiles.schema import Profile


def plan(order: JobOrder, events: EventWriter) -> Row:
    """One plan; one that does not fit is a result too."""
    request, options = order.request, PlanOptions.of(order.request)
    profile = _profile(order, request["profile"])
    planner = planner_of(chosen(profile, options.optimizer, options.max_grad_norm))
    started = time.monotonic()
    planned = planner.plan(
        request["memory"],
        policy=None if options.policy == SOLVER else options.policy,
        time_limit=options.time_limit,
        gap=options.gap,
        progress=lambda figures: events.progress(**_finite(figures)),
    )
    seconds_left = options.time_limit - (time.monotonic() - started)
    explanation = explained(planner, planned, time_limit=options.time_limit, left=seconds_left).model_dump(mode="json")
    objects = ObjectStore(Path(order.objects))
    file = keep_plan(objects, order, planned, request["profile"], explanation=explanation)
    summary = plan_summary(planned) | {"explanation": explanation}
    return {"result": {"plan": file["id"], "summary": summary}, "files": [file]}


def comparison(order: JobOrder, events: EventWriter) -> Row:
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
        _profile(order, request["profile"]),
        request["memory"],
        request["policies"],
        devices=[None if name == OWN_DEVICE else name for name in request["devices"]],
        **PlanOptions.of(request).model_dump(exclude={"policy", "progress"}),
        planned=planned,
        solving=lambda figures: events.progress(**_finite(figures), done=plans_made, total=total),
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


def answer_plan(order: JobOrder, events: EventWriter) -> Row:
    """What stays in memory between the tokens of answers; None where nothing fits."""
    problems = [ChoiceProblem.model_validate(problem) for problem in order.request["problems"]]
    choices = choose_each(problems)
    return {"result": {"choices": [choice and choice.model_dump() for choice in choices]}, "files": []}


WORK: Mapping[str, Callable[[JobOrder, EventWriter], Row]] = {
    "plan": plan,
    "comparison": comparison,
    "answer-plan": answer_plan,
}
"""kind of a job -> what carries it out"""


def _finite(figures: Mapping[str, float | str]) -> Row:
    """The figures with 0 for infinity (no plan or no bound yet), which JSON cannot hold."""
    return {k: 0.0 if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


def _profile(order: JobOrder, identity: str) -> Profile:
    return parse_profile(order.content(identity), f"the stored profile {identity}")
