"""Plans a fleet whose devices meet at every step: data parallel, as a pipeline, or as whichever is shorter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tightfit.planner.fleet.options import FleetOptions
from tightfit.planner.fleet.pipeline import least_seconds, plan_pipeline
from tightfit.planner.fleet.plan import MemberSpec, plan_fleet
from tightfit.planner.fleet.schema import FleetPlan, PipelinePlan
from tightfit.planner.schema import Plan
from tightfit.profiles.option_fields import keywords_of
from tightfit.runtime.common.errors import InfeasibleError
from tightfit.runtime.common.units import format_seconds

FIRST_SHARE = 0.5
"""of the time limit: for the data-parallel plan, where a pipeline may have to be planned too"""


@keywords_of(FleetOptions)
def plan_kind(
    members: Sequence[MemberSpec], micro_batches: int, asked: FleetOptions
) -> tuple[FleetPlan | PipelinePlan, dict[str, Plan], str | None]:
    """The plan of a fleet and those of its members, as `plan_fleet` or `plan_pipeline` make them, and why it is of this
    kind where that was left open.

    Raises as these do, and InputError for a kind that is none, and for `bits` where nothing passes over a cut.
    """
    kind, bits, limit = asked.kind, asked.bits, asked.time_limit
    options: dict[str, Any] = {"prices": asked.prices, "progress": asked.progress}
    options |= {} if asked.gap is None else {"gap": asked.gap}
    if kind == "data":
        return *plan_fleet(members, micro_batches, time_limit=limit, **options), None
    if kind == "pipeline":
        return *plan_pipeline(members, micro_batches, bits=bits, time_limit=limit, **options), None
    started = time.monotonic()
    least = least_seconds(members, micro_batches, bits=bits)
    try:
        share = FIRST_SHARE if least is not None else 1.0
        data, plans = plan_fleet(members, micro_batches, time_limit=share * limit, **options)
    except InfeasibleError:
        if least is None:
            raise
        left = max(1.0, limit - (time.monotonic() - started))
        pipeline, stages = plan_pipeline(members, micro_batches, bits=bits, time_limit=left, **options)
        return pipeline, stages, "a pipeline: no device can hold a micro-batch of the whole model"
    alone = format_seconds(data.makespan_seconds)
    if least is None:
        return data, plans, "data parallel: the model cannot be cut"
    if least >= data.makespan_seconds:
        return data, plans, f"data parallel ({alone}): no pipeline takes less than {format_seconds(least)}"
    try:
        left = max(1.0, limit - (time.monotonic() - started))
        pipeline, stages = plan_pipeline(members, micro_batches, bits=bits, time_limit=left, **options)
    except InfeasibleError:
        return data, plans, f"data parallel ({alone}): no pipeline was found that the devices can hold"
    found = format_seconds(pipeline.makespan_seconds)
    if pipeline.makespan_seconds < data.makespan_seconds and len(pipeline.chain) > 1:
        return pipeline, stages, f"a pipeline ({found}): shorter than data parallel ({alone})"
    return data, plans, f"data parallel ({alone}): the best pipeline found takes {found}"
