"""The options of planning for a fleet whose devices meet at every step, for the library and the client of a service alike."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from tightfit.planner.search_options import LONGEST_LIMIT, Progress
from tightfit.profiles.option_fields import Options, option
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

Kind = Literal["auto", "data", "pipeline"]


class FleetOptions(Options):
    """How a fleet is planned for (`tightfit.planner.fleet.kinds.plan_kind`)."""

    kind: Kind = option(
        "auto",
        "data: every device has the whole model and some of the micro-batches; pipeline: some of the layers and all micro-batches;"
        " auto: data, unless no device can hold a micro-batch or a pipeline is shorter.",
    )
    bits: Literal[0, 8] = option(0, "Of a number in a pipeline's messages; 0: as it is.")
    time_limit: float = option(
        120.0, "Seconds that all of the planning may take.", metavar="SECONDS", gt=0, le=LONGEST_LIMIT
    )
    gap: float | None = option(
        None,
        "Relative gap at which a search may stop; null: 0.001 for data, 0.01 for a pipeline.",
        metavar="SHARE",
        ge=0,
        lt=1,
    )
    prices: bool = option(True, "Also say what more memory or a faster link of each device would be worth.")
    progress: Progress | None = None

    @model_validator(mode="after")
    def _messages(self) -> Self:
        if self.kind == "data" and self.bits:
            raise InputError(
                f"{spelled('bits')} {self.bits}: only a pipeline has messages of numbers; leave it out, or ask for kind pipeline"
            )
        return self
