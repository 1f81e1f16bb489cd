"""The plan of split federated rounds: how many lower layers each device holds, and in which order the server serves them.

In a round every device trains an adapter of its own, from the fleet's, as in a federated one (`federated_schema`). But it
computes the model's lower layers alone, as many as its plan says, and a server the rest: the two are a pipeline of two
stages (`pipeline_schema`). The server's budget holds one such pipeline at a time, so that it serves one device after the
other. Each device answers with the lower part of its adapter; the upper part is what the server has trained for it. The
mean of the whole adapters, weighted by tokens, is the next round's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tightfit.planner.fleet.pipeline_schema import Passed
from tightfit.planner.fleet.schema import FLEET_VERSION, Link, Participant, Record

SERVER = "server"
"""what the server is called among the members"""


class SplitServer(Record):
    """The machine that computes the upper layers, for one device at a time."""

    device: str = Field(description="the device's name, as its profile has it")
    measured: bool = Field(description="False: its profile is estimated, so that it cannot run this plan")
    budget_bytes: int = Field(description="for a run of the upper layers; Flower's processes there are not counted")
    link: Link
    start_seconds: float = Field(ge=0, description="of a service beside its steps: until a run trains, and ends")


class SplitMember(Participant):
    """One device. Those that take part come first, in the order in which they are served."""

    budget_bytes: int = Field(description="for all that runs there, Flower's processes included")
    flower_bytes: int = Field(description="of the budget: set aside for Flower's processes on the device")
    rank: int = Field(ge=1, description="of the adapter")
    start_seconds: float = Field(ge=0, description="of its head beside the transfer: until its run is ready")
    weight: float = Field(1.0, gt=0, description="of its share of the steps")
    plan: str | None = Field(None, description="file of its plan, beside the fleet's; None: it takes no part")
    server_plan: str | None = Field(None, description="file of the server's plan for the layers above")
    server_plan_fingerprint: str | None = None
    layers: int = Field(0, ge=0, description="number of the model's lower layers that it holds")
    layer_names: list[str] = Field([], description="the last layer that it holds, and the first one of the server")
    ahead: int = Field(0, ge=0, description="micro-batches whose forward runs before their gradients are waited for")
    up: list[Passed] = Field([], description="activations that pass up over its cut, in this order")
    down: list[Passed] = Field([], description="gradients that pass down")
    adapter_bytes: int = Field(0, ge=0, description="of the lower part of the adapter, which passes both ways")
    steps: int = Field(0, ge=0, description="micro-batches of a round")
    step_seconds: float | None = Field(None, description="predicted seconds of one, the mean over those of an update")
    bound_seconds: float | None = Field(None, description="no plans of these layers take less within the budgets")
    peak_bytes: int | None = Field(
        None, description="predicted peak of all that runs there, Flower's processes included"
    )
    server_peak_bytes: int | None = Field(None, description="predicted peak of the server's run")
    exchange_bytes: int = Field(0, ge=0, description="bytes of its peak that are there for messages alone")
    server_exchange_bytes: int = Field(0, ge=0, description="the same of the server's")
    head_seconds: float = Field(0.0, ge=0, description="from when a round begins until it is ready")
    service_seconds: float = Field(0.0, ge=0, description="for which the server is busy with it")
    tail_seconds: float = Field(0.0, ge=0, description="from then until its answer has arrived")
    begin_seconds: float = Field(0.0, ge=0, description="when its service begins, counted from when the round does")
    round_seconds: float = Field(0.0, ge=0, description="when its answer has arrived")


class SplitBaseline(Record):
    """A fixed way to make a round, judged in the same terms."""

    name: Literal["order as described", "one cut for all", "whole models", "without a device"]
    makespan_seconds: float | None = Field(description="None: some device cannot hold its part")
    layers: dict[str, int] = Field(description="number of layers by member; without a device by all others")
    reason: str | None = Field(None, description="why there is no makespan")


class SplitPlan(Record):
    version: int = FLEET_VERSION
    fingerprint: str = Field(description="sha256 of everything else here")
    kind: Literal["split federated"] = "split federated"
    model: str
    steps: int = Field(ge=1, description="micro-batches of a round, of all devices together")
    accumulate: int = Field(ge=1, description="micro-batches of an update; each device takes a multiple of it")
    batch: int = Field(description="rows of a micro-batch")
    rank: int = Field(ge=1, description="of the adapter")
    adapter_bytes: int = Field(description="of the whole adapter")
    server: SplitServer
    members: list[SplitMember]
    makespan_seconds: float = Field(description="predicted seconds of a round, until the last answer has arrived")
    bound_seconds: float = Field(description="no order, no cuts and no plans of this class take less")
    gap: float = Field(description="(makespan_seconds - bound_seconds) / makespan_seconds")
    order_gap: float = Field(description="the same where the plans of the stages are given: of the order and the cuts")
    solve_seconds: float
    bit_identical: bool = Field(
        description="whether results equal those of devices that compute all layers, to the bit: the profiles agree in"
        " everything that decides how operators round"
    )
    differences: list[str] = Field([], description="in words, in what the profiles do not agree")
    baselines: list[SplitBaseline] = []

    @property
    def taking(self) -> list[SplitMember]:
        """The members that take part in rounds, in the order in which they are served."""
        return [member for member in self.members if member.steps]
