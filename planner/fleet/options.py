"""The options of planning for a fleet whose devices meet at every step, for the library and the client of a service alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tightfit.planner.search_options import Progress

Kind = Literal["auto", "data", "pipeline"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """How a fleet is planned for (`tightfit.planner.fleet.kinds.plan_kind`)."""

    kind: Kind = "auto"
    """auto: data parallel, unless no device can hold a micro-batch or a pipeline is shorter"""
    bits: int = 0
    """of a number in a pipeline's messages, 8; 0: as it is"""
    time_limit: float = 120.0
    """seconds for all of the planning"""
    gap: float | None = None
    """at which a search may stop; None: what each kind of plan stops at by itself"""
    prices: bool = True
    """whether to say what more memory or a faster link of each device would be worth"""
    progress: Progress | None = None
