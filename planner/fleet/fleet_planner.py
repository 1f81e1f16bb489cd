"""The planner of fleets: which devices of a description take part, what each computes and holds, and the proof.

Kinds of fleets are in `tightfit.planner.fleet.kinds`, a file each, and a line in the table `KINDS`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.kinds.data_parallel import SumPlanner
from tightfit.planner.fleet.kinds.frame import FleetPlanner
from tightfit.planner.fleet.kinds.pipeline import PipelinePlanner, least_seconds
from tightfit.planner.fleet.kinds.rounds import WholeRounds
from tightfit.planner.fleet.kinds.side import SidePlanner
from tightfit.planner.fleet.kinds.split_rounds import SplitRounds
from tightfit.planner.fleet.options import FEDERATED, FleetOptions
from tightfit.planner.fleet.part_plans import no_time
from tightfit.planner.fleet.schema import FleetPlan
from tightfit.planner.schema import Plan
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.schema import MOBILLM
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_seconds

KINDS: Mapping[str, type[FleetPlanner]] = {
    "data": SumPlanner,
    "pipeline": PipelinePlanner,
    MOBILLM: SidePlanner,
    FEDERATED: WholeRounds,
}
"""by the option's name; federated rounds with a server are `SplitRounds`"""
FIRST_SHARE = 0.5
"""of the time limit: for the data-parallel plan, where a pipeline may have to be planned too"""


@keywords_of(FleetOptions)
def plan_fleet(described: DescribedFleet, asked: FleetOptions) -> tuple[FleetPlan, dict[str, Plan], str | None]:
    """The shortest step or round found of a fleet, with its proof; the plans of its parts by the names that these have
    there; and why it is of this kind where that was left open.

    Members that cannot hold their part, or would not make it shorter, take no part; the plan says why. The search ends
    once the plan is proven to be within `gap` of the best of its kind, nothing is left to try, or `time_limit` seconds
    are over. `progress` is called with stage, incumbent, bound, gap and seconds. Raises InputError for members that
    cannot train together, a number that cannot be used, or an option of another kind, and InfeasibleError where nothing
    fits.
    """
    kind = FEDERATED if described.of_rounds else asked.kind
    foreign = ["bits"] if kind in ("data", FEDERATED) else []
    foreign += [] if kind == FEDERATED else ["start", "server_start"]
    for name in foreign:
        if getattr(asked, name) is not None:
            raise InputError(
                f"{spelled(name)} {getattr(asked, name)} is for fleets of another kind; plan {kind} without it"
            )
    if kind == "auto":
        return _shorter(described, asked)
    planner = SplitRounds if described.server else KINDS[kind]
    return *planner(described, asked).plan(), None


def _shorter(described: DescribedFleet, asked: FleetOptions) -> tuple[FleetPlan, dict[str, Plan], str]:
    """Data parallel, unless no device can hold a micro-batch or a pipeline is shorter."""
    started = time.monotonic()
    least = least_seconds(described.members, described.count, bits=asked.bits or 0)
    data: FleetPlan | None = None
    plans: dict[str, Plan] = {}
    try:
        share = FIRST_SHARE if least is not None else 1.0
        data, plans = SumPlanner(described, asked.but(time_limit=share * asked.time_limit)).plan()
    except InfeasibleError:
        if least is None:
            raise
    alone = "" if data is None else f"data parallel ({format_seconds(data.makespan_seconds)})"
    if data is not None and least is None:
        return data, plans, "data parallel: the model cannot be cut"
    if data is not None and least is not None and least >= data.makespan_seconds:
        return data, plans, f"{alone}: no pipeline takes less than {format_seconds(least)}"
    left = asked.time_limit - (time.monotonic() - started)
    if data is not None and left <= 0:
        return data, plans, f"{alone}: {no_time('a pipeline')}"
    try:
        pipeline, stages = PipelinePlanner(described, asked.but(time_limit=left)).plan()
    except InfeasibleError:
        if data is None:
            raise
        return data, plans, f"{alone}: no pipeline was found that the devices can hold"
    if data is None:
        return pipeline, stages, "a pipeline: no device can hold a micro-batch of the whole model"
    takes = format_seconds(pipeline.makespan_seconds)
    if pipeline.makespan_seconds < data.makespan_seconds and len(pipeline.names) > 1:
        return pipeline, stages, f"a pipeline ({takes}): shorter than {alone}"
    return data, plans, f"{alone}: the best pipeline found takes {takes}"
