"""The plan of a pipeline: which devices hold which layers of a model, what passes between them, and when a step is done.

The members that compute form a chain. Each holds a **stage**, a run of neighbouring layers, and has an ordinary plan of
its own for them (`tightfit.planner.fleet.stages`). A step is `micro_batches` micro-batches; then each member updates what
it trains, inside its plan's last micro-batch. Activations pass up the chain, gradients down, one message per micro-batch
and cut (`tightfit.runtime.engine.fleet.message`).

A stage runs the plan's training schedule for one micro-batch after the other. With `ahead` d = 0 it sends activations
when its forward ends, and waits for their gradients. With d >= 1 it first runs the forward alone (the plan's schedule for
evaluation) of d micro-batches, which send activations up, and then of another one after each micro-batch that it has
trained. Its training schedule then repeats the forward, and sends nothing up. What it has received stays in a ring of
messages until it has been trained.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tightfit.planner.fleet.schema import FLEET_VERSION, Participant, Price, Record, Span


class Passed(Record):
    """A tensor that passes over a cut."""

    shape: list[int]
    dtype: str = Field(description="torch dtype without the prefix")


class Stage(Participant):
    """One device. Those that compute come first, in the order of the chain: the first has the model's first layers."""

    first_layer: int = Field(0, ge=0, description="index of its first layer in the profile")
    last_layer: int = Field(0, ge=0, description="index of the layer after its last one")
    layer_names: list[str] = Field([], description="its first and its last layer")
    ahead: int = Field(0, ge=0, description="micro-batches whose forward runs before their gradients are waited for")
    up: list[Passed] = Field([], description="activations that it sends to the next stage, in this order")
    down: list[Passed] = Field([], description="gradients that it sends to the stage before")
    micro_batch_seconds: float | None = Field(
        None, description="predicted seconds of the training schedule, no waiting"
    )
    forward_seconds: float | None = Field(None, description="the same of the forward alone")
    peak_bytes: int | None = Field(None, description="predicted peak of its processes, messages included")
    exchange_bytes: int = Field(0, ge=0, description="bytes of the peak that are there for messages alone")


class PipelineBaseline(Record):
    """A fixed way to cut the model, judged by the same simulator."""

    name: Literal["equal layers", "fastest alone"]
    makespan_seconds: float | None = Field(description="None: some device cannot hold its layers")
    layers: dict[str, int] = Field(description="number of layers by member")
    reason: str | None = Field(None, description="why there is no makespan")


class PipelinePlan(Record):
    version: int = FLEET_VERSION
    fingerprint: str = Field(description="sha256 of everything else here")
    kind: Literal["pipeline"] = "pipeline"
    model: str
    micro_batches: int = Field(ge=1, description="micro-batches of a step")
    batch: int = Field(description="rows of a micro-batch")
    bits: Literal[0, 4, 8] = Field(0, description="of a number in a message; 0: as it is")
    members: list[Stage]
    makespan_seconds: float = Field(description="predicted seconds of a step, as the simulator states them")
    bound_seconds: float = Field(description="no cuts, order and plans of this class take less")
    gap: float = Field(description="(makespan_seconds - bound_seconds) / makespan_seconds")
    link_bytes: list[int] = Field([], description="bytes of a step that pass over each cut, both ways together")
    solve_seconds: float
    bit_identical: bool = Field(
        description="whether results equal those of one process to the bit: messages are exact, and the members' profiles"
        " agree in everything that decides how operators round"
    )
    differences: list[str] = Field([], description="in words, in what the profiles do not agree")
    baselines: list[PipelineBaseline] = []
    prices: list[Price] = []
    timeline: list[Span] = []

    @property
    def chain(self) -> list[Stage]:
        """The members that compute, in the order of their layers."""
        return [member for member in self.members if member.plan is not None]
