"""The job that makes a plan; one that does not fit is a result too."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

from tightfit.planner.plan import planner_of
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.report.marginal_value import explained
from tightfit.planner.report.summary import plan_summary
from tightfit.planner.search_options import SOLVER, PlanOptions
from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.jobs.work.inputs import profile_of
from tightfit.planner.service.jobs.work.keeping import keep_plan
from tightfit.planner.service.wire.objects import ObjectStore


def do(order: JobOrder, events: EventWriter) -> Row:
    """One plan; one that does not fit is a result too."""
    request, options = order.request, PlanOptions.of(order.request)
    profile = profile_of(order)
    planner = planner_of(chosen(profile, options.optimizer, options.max_grad_norm))
    started = time.monotonic()
    planned = planner.plan(
        request["memory"],
        policy=None if options.policy == SOLVER else options.policy,
        time_limit=options.seconds,
        gap=options.gap,
        progress=lambda figures: events.progress(**finite(figures)),
    )
    seconds_left = options.seconds - (time.monotonic() - started)
    explanation = explained(planner, planned, left=seconds_left).model_dump(mode="json")
    objects = ObjectStore(Path(order.objects))
    file = keep_plan(objects, order, planned, request["profile"], explanation=explanation)
    summary = plan_summary(planned) | {"explanation": explanation}
    return {"result": {"plan": file["id"], "summary": summary}, "files": [file]}


def finite(figures: Mapping[str, float | str]) -> Row:
    """The figures with 0 for infinity (no plan or no bound yet), which JSON cannot hold."""
    return {k: 0.0 if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
