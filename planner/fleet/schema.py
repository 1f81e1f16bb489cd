"""The fleet plan's data model: which devices take part in a step, what each computes and holds, and when all are done.

A step (an update of the trained tensors) is `micro_batches` micro-batches in a global order. Every member computes a
run of neighbouring ones by a plan of its own, within its own budget, and keeps its gradients apart. Then the members
form a chain, in the order of their micro-batches: each adds its gradients, in the global order, to the sum that comes
from the member before it. The last one sends the mean back down the chain, and everyone makes the same update. So the
sum is rounded as in one process that accumulates the same micro-batches, and both directions of every link are used.

The trained tensors pass through the chain in pieces of whole tensors, `PIECE_BYTES` or less, so that all links work at
once.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FLEET_VERSION = 1
PIECE_BYTES = 256 << 10
"""gradients are sent in pieces of whole tensors, of at most this size unless one tensor is larger"""
BUFFERS = 8
"""pieces that a member holds at once while gradients are exchanged: two that arrive and one that leaves in each
direction, and two being written to disk"""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
"""what a member may be called: files are named after it"""

Shelf = Literal["memory", "disk"]
"""where what outlives a micro-batch lies on a member: in anonymous memory, or in an unnamed file"""


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Link(Record):
    """A member's connection to the network; both directions can be busy at once."""

    up_bytes_per_second: float = Field(gt=0)
    down_bytes_per_second: float = Field(gt=0)
    latency_seconds: float = Field(0.0, ge=0, description="from this member's process to the network, one way")


class Participant(Record):
    """A device that may take part, in a fleet of any kind."""

    name: str
    device: str = Field(description="the device's name, as its profile has it")
    measured: bool = Field(description="False: its profile is estimated, so that it cannot run this plan")
    budget_bytes: int
    link: Link
    plan: str | None = Field(description="file of its plan, beside the fleet's; None: it takes no part")
    plan_fingerprint: str | None = None
    reason: str | None = Field(None, description="why it takes no part")
    bound_seconds: float | None = Field(
        None, description="no plan of the class takes less for a micro-batch, or a step of a round, within its budget"
    )


class Member(Participant):
    """One device of the fleet. Those that compute come first, in the order of the chain."""

    first: int = Field(0, ge=0, description="number of its first micro-batch in a step, from 0")
    micro_batches: int = Field(0, ge=0)
    micro_batch_seconds: float | None = Field(None, description="predicted seconds of one micro-batch")
    peak_bytes: int | None = Field(None, description="predicted peak of its processes, the exchange included")
    exchange_bytes: int = Field(0, description="bytes of the peak that are there for the exchange alone")
    update_seconds: float = Field(0.0, ge=0, description="of the optimizer's arithmetic for all trained tensors")
    gradients: Shelf = "disk"
    """where its gradients wait for the exchange; the first of the chain adds its own up as they come"""
    states: Shelf = "disk"
    """where the optimizer's states lie between steps"""


class Span(Record):
    """What a device or a link does for a while, for the picture of a step."""

    lane: str = Field(description="a member's name, or `FROM → TO` for a link")
    what: Literal["compute", "add", "send", "update", "forward", "again", "backward"] = Field(
        description="in a pipeline: forward, again (the forward that is repeated for the backward), backward, send"
    )
    begin_seconds: float
    end_seconds: float
    micro_batch: int | None = Field(
        None, description="compute, and all of a pipeline: number of the micro-batch in the step, from 0"
    )


class Baseline(Record):
    """A fixed way to share the work, judged by the same simulator."""

    name: Literal["equal shares", "fastest alone"]
    makespan_seconds: float | None = Field(description="None: some device cannot hold its share")
    micro_batches: dict[str, int] = Field(description="by member")
    reason: str | None = Field(None, description="why there is no makespan")


class Price(Record):
    """What a step would gain if a member had more of something."""

    member: str
    memory_bytes: int = Field(description="how much more memory was given")
    memory_gain_seconds: float = Field(description="by how much the makespan falls with it")
    link_gain_seconds: float = Field(description="by how much it falls with a link of twice the speed, both ways")


class FleetPlan(Record):
    version: int = FLEET_VERSION
    fingerprint: str = Field(description="sha256 of everything else here")
    kind: Literal["data parallel"] = "data parallel"
    model: str
    micro_batches: int = Field(ge=1, description="micro-batches of a step, in all")
    batch: int = Field(description="rows of a micro-batch")
    trained_bytes: int = Field(description="bytes of the trained tensors, which pass over every link of the chain")
    members: list[Member]
    makespan_seconds: float = Field(description="predicted seconds of a step, as the simulator states them")
    bound_seconds: float = Field(description="no allotment and no plans of this class take less")
    gap: float = Field(description="(makespan_seconds - bound_seconds) / makespan_seconds")
    compute_seconds: float = Field(description="until the last member has computed its micro-batches")
    exchange_seconds: float = Field(description="from there until every member has the sum")
    update_seconds: float = Field(description="from there until every member has made the update")
    solve_seconds: float
    bit_identical: bool = Field(
        description="whether results equal those of one process to the bit, whatever the allotment: the members' profiles"
        " agree in everything that decides how operators round"
    )
    differences: list[str] = Field([], description="in words, in what the profiles do not agree")
    baselines: list[Baseline] = []
    prices: list[Price] = []
    timeline: list[Span] = []

    @property
    def chain(self) -> list[Member]:
        """The members that compute, in the order in which gradients pass from one to the next."""
        return [member for member in self.members if member.micro_batches]
