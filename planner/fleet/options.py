"""The options of planning for fleets."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from tightfit.planner.search_options import Gap, SearchProgress, Seconds
from tightfit.profiles.option_fields import Options, option
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

Kind = Literal["auto", "data", "pipeline"]
FEDERATED = "federated"
"""the kind of fleets that meet once a round, split or not"""
NODE_BYTES = 42 << 20
"""Flower on a device, as `tightfit fleet federate join` runs it: one process, which speaks Flower's protocol with
little memory. Measured while a run trains (flwr 1.42, Python 3.11, x86-64, with TLS): 41.0 MiB resident, of which 18.7
are its own alone
"""
START_SECONDS = 6.0
"""of a round on a device, beside transfers and steps: until the order is looked for, `tightfit run` is ready and the
answer is looked for. Measured with a model of two layers on two busy cores: 5 to 7 s"""
SERVER_START_SECONDS = 4.0
"""of a service beside its steps: until the server's run trains, and has ended. Measured with a model of three layers on
two busy cores: 3.2 to 5.8 s
"""


class FleetPlanOptions(Options):
    """What the planning of a fleet of any kind may take."""

    time_limit: Seconds = option(120.0, "Seconds that all of the planning may take.", metavar="SECONDS")
    progress: SearchProgress | None = None


class FleetOptions(FleetPlanOptions):
    """How a fleet whose devices meet at every step is planned for (`fleet_planner.plan_kind`)."""

    kind: Kind = option(
        "auto",
        "data: every device has the whole model and some of the micro-batches; pipeline: some of the layers and all"
        " micro-batches; auto: data, unless no device can hold a micro-batch or a pipeline is shorter.",
    )
    bits: Literal[0, 8] = option(0, "Of a number in a pipeline's messages; 0: as it is.")
    gap: Gap | None = option(
        None,
        "Relative gap at which a search may stop; default: 0.01 for a pipeline, else 0.001.",
        metavar="SHARE",
    )

    @model_validator(mode="after")
    def _messages(self) -> Self:
        if self.kind == "data" and self.bits:
            raise InputError(
                f"{spelled('bits')} {self.bits}: only a pipeline has messages of numbers; leave it out, or ask for kind"
                " pipeline"
            )
        return self


class SharedBatchesOptions(FleetPlanOptions):
    """Of fleets that share out the micro-batches of a step."""

    gap: Gap = 1e-3


class PipelineOptions(FleetPlanOptions):
    """Of pipelines, whose search is longer."""

    gap: Gap = 1e-2
    bits: int = 0


class WholeRoundsOptions(FleetPlanOptions):
    """Of federated rounds of whole models."""

    gap: Gap = 1e-3
    flower_bytes: int = NODE_BYTES
    start_seconds: float = START_SECONDS


class SplitRoundsOptions(WholeRoundsOptions):
    """Of split federated rounds."""

    server_start_seconds: float = SERVER_START_SECONDS
    weights: dict[str, int | float] | None = None


class RoundsPlanOptions(FleetPlanOptions):
    """How federated rounds are planned for (`tightfit.planner.fleet.rounds`)."""

    start: float | None = option(
        None, "Of a round on a device, beside transfers and steps, as you measured it.", metavar="SECONDS", ge=0
    )
    server_start: float | None = option(
        None, "Of the service of a device, beside its steps; with a [server].", metavar="SECONDS", ge=0
    )
