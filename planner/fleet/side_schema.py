"""The plan of a device and a server that train a side network (the policy `mobillm`): what passes, and when a step is done.

A step is `micro_batches` micro-batches. The device runs the frozen model's forward of each and sends the outputs of the
chosen blocks; the server trains the side network from them and makes one update. Nothing comes back but the word that the
step is done, so that the device computes the next micro-batches while messages pass and the server trains
(`tightfit.planner.fleet.side`). What is trained is the side network: the device's model stays as it is.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tightfit.planner.fleet.pipeline_schema import Passed
from tightfit.planner.fleet.schema import FLEET_VERSION, Link, Record, Span


class SideMember(Record):
    """The device, or the server."""

    name: str
    does: Literal["forward", "side network"]
    device: str = Field(description="the machine's name, as its profile has it")
    measured: bool = Field(description="False: its profile is estimated, so that it cannot run this plan")
    budget_bytes: int
    link: Link
    plan: str = Field(description="file of its plan, beside the fleet's")
    plan_fingerprint: str
    micro_batch_seconds: float = Field(description="predicted seconds of its part of a micro-batch, no waiting")
    bound_seconds: float = Field(description="no plan of the class takes less for one within its budget")
    peak_bytes: int = Field(description="predicted peak of its processes, messages included")
    exchange_bytes: int = Field(ge=0, description="bytes of the peak that are there for messages alone")


class SidePlan(Record):
    version: int = FLEET_VERSION
    fingerprint: str = Field(description="sha256 of everything else here")
    kind: Literal["mobillm"] = "mobillm"
    model: str
    micro_batches: int = Field(ge=1, description="micro-batches of a step")
    batch: int = Field(description="rows of a micro-batch")
    bits: Literal[0, 4, 8] = Field(description="of a number in a message; 0: as it is")
    blocks: list[int] = Field(description="indices of the model's blocks whose outputs are sent")
    rank: int = Field(description="width of the side network's adapters")
    members: list[SideMember] = Field(min_length=2, max_length=2, description="the device, then the server")
    message: list[Passed] = Field(description="what passes for a micro-batch, in this order")
    message_bytes: int = Field(description="bytes of that message")
    makespan_seconds: float = Field(description="predicted seconds of a step, until both know that it is done")
    bound_seconds: float = Field(description="no plans of the class make a step that takes less")
    gap: float = Field(description="(makespan_seconds - bound_seconds) / makespan_seconds")
    device_alone_seconds: float | None = Field(
        description="what a step of backpropagation takes the device alone within its budget; None: it does not fit"
    )
    solve_seconds: float
    timeline: list[Span] = []

    @property
    def chain(self) -> list[SideMember]:
        """The members in the order in which they compute."""
        return self.members

    @property
    def bit_identical(self) -> bool:
        """Nothing is computed twice that would have to be equal."""
        return False
