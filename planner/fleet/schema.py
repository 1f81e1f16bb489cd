"""The data model of fleets' plans: which devices take part, what each computes and holds, and when all are done.

A fleet is **replicas** of a **chain** of **parts**, joined every so many steps. A part is what one device computes with
a plan of its own, within its own budget; a chain is one part, or several over which activations pass up and gradients
down; replicas share out micro-batches or data. There are five kinds, each a point of that:

| kind | replicas | parts of each | joined |
|---|---|---|---|
| data parallel | as many as members, which share out a step's micro-batches | 1, the whole model | every step, by the sum of gradients |
| pipeline | 1 | as many as members, of some layers each | – |
| mobillm | 1 | 2: the device's forward, the server's side network; messages pass up alone | – |
| federated | as many as members, each with data of its own | 1, the whole model | every round, by the mean of adapters |
| split federated | as many as members, each with data of its own | 2: the device's lower layers, the server's upper ones | the same |

`tightfit.planner.fleet.parts` says any plan in these terms.

**Data parallel.** A step (an update of the trained tensors) is `micro_batches` micro-batches in a global order. Every
member computes a run of neighbouring ones and keeps its gradients apart. Then the members form a chain, in the order of
their micro-batches: each adds its gradients, in the global order, to the sum that comes from the member before it. The
last one sends the mean back down the chain, and everyone makes the same update. So the sum is rounded as in one process
that accumulates the same micro-batches, and both directions of every link are used. The trained tensors pass in pieces
of whole tensors, `PIECE_BYTES` or less, so that all links work at once.

**Pipeline.** Each member holds a **stage**, a run of neighbouring layers (`tightfit.planner.fleet.part_profiles`), and
updates what it trains inside its plan's last micro-batch. One message per micro-batch, cut and direction passes
(`tightfit.runtime.engine.fleet.message`). A stage runs the plan's training schedule for one micro-batch after the
other. With `ahead` d = 0 it sends activations when its forward ends, and waits for their gradients. With d >= 1 it
first runs the forward alone (the plan's schedule for evaluation) of d micro-batches, which send activations up, and
then of another one after each micro-batch that it has trained. Its training schedule then repeats the forward, and
sends nothing up. What it has received stays in a ring of messages until it has been trained.

**mobillm.** The device runs the frozen model's forward of each micro-batch and sends the outputs of the chosen blocks;
the server trains the side network from them and makes one update. Nothing comes back but the word that the step is
done.

**Federated.** In a round every device gets the fleet's adapter, takes a number of steps of its own on its own data, and
sends back what the adapter has become. The server adds the answers up, weighted by the tokens that each was trained on.
A device that does not answer is left out.

**Split federated.** The same, but each device computes the model's lower layers alone, and the server the rest. The
server's budget holds one such pipeline at a time, so that it serves one device after the other. Each device answers
with the lower part of its adapter; the upper part is what the server has trained for it.
"""  # noqa: E501  a row of a table is one line

from __future__ import annotations

import re
from typing import Generic, Literal, TypeVar

from pydantic import Field

from tightfit.profiles.schema import FrozenRecord

FLEET_VERSION = 3
PIECE_BYTES = 256 << 10
"""gradients are sent in pieces of whole tensors, of at most this size unless one tensor is larger"""
BUFFERS = 8
"""pieces that a member holds at once while gradients are exchanged: two that arrive and one that leaves in each
direction, and two being written to disk"""
LARGEST_STEPS = 1_000_000
"""local steps of a round, at most"""
SERVER = "server"
"""what the server of split rounds is called among the members"""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
"""what a member may be called: files are named after it"""

Shelf = Literal["memory", "disk"]
"""where what outlives a micro-batch lies on a member: in anonymous memory, or in an unnamed file"""


class Link(FrozenRecord):
    """A member's connection to the network; both directions can be busy at once."""

    up_bytes_per_second: float = Field(gt=0)
    down_bytes_per_second: float = Field(gt=0)
    latency_seconds: float = Field(0.0, ge=0, description="from this member's process to the network, one way")


class Passed(FrozenRecord):
    """A tensor that passes over a cut."""

    shape: list[int]
    dtype: str = Field(description="torch dtype without the prefix")


# --- members ----------------------------------------------------------------------------------------------------------


class PlannedMember(FrozenRecord):
    """A device, in a fleet of any kind."""

    name: str
    device: str = Field(description="the device's name, as its profile has it")
    measured: bool = Field(description="False: its profile is estimated, so that it cannot run this plan")
    budget_bytes: int
    link: Link
    plan: str | None = Field(None, description="file of its plan, beside the fleet's; None: it takes no part")
    plan_fingerprint: str | None = None
    bound_seconds: float | None = Field(
        None, description="no plan of the class takes less for a micro-batch, or a step of a round, within its budget"
    )
    peak_bytes: int | None = Field(None, description="predicted peak of all that the budget is for")

    @property
    def takes_part(self) -> bool:
        return self.plan is not None


class Participant(PlannedMember):
    """A device that may take part."""

    reason: str | None = Field(None, description="why it takes no part")


class StepMember(Participant):
    """A device of a fleet that meets at every step."""

    micro_batch_seconds: float | None = Field(
        None, description="predicted seconds of the training schedule for one micro-batch, no waiting"
    )
    exchange_bytes: int = Field(0, ge=0, description="bytes of the peak that are there for what passes alone")


class Member(StepMember):
    """A device with the whole model and some of the micro-batches."""

    first: int = Field(0, ge=0, description="number of its first micro-batch in a step, from 0")
    micro_batches: int = Field(0, ge=0)
    update_seconds: float = Field(0.0, ge=0, description="of the optimizer's arithmetic for all trained tensors")
    gradients: Shelf = "disk"
    """where its gradients wait for the exchange; the first of the chain adds its own up as they come"""
    states: Shelf = "disk"
    """where the optimizer's states lie between steps"""

    @property
    def takes_part(self) -> bool:
        return bool(self.micro_batches)


class StageMember(StepMember):
    """A device with some of the layers."""

    first_layer: int = Field(0, ge=0, description="index of its first layer in the profile")
    last_layer: int = Field(0, ge=0, description="index of the layer after its last one")
    layer_names: list[str] = Field([], description="its first and its last layer")
    ahead: int = Field(0, ge=0, description="micro-batches whose forward runs before their gradients are waited for")
    up: list[Passed] = Field([], description="activations that it sends to the next stage, in this order")
    down: list[Passed] = Field([], description="gradients that it sends to the stage before")
    forward_seconds: float | None = Field(None, description="predicted seconds of the forward alone")


class SideMember(PlannedMember):
    """Of mobillm: the device, or the server."""

    does: Literal["forward", "side network"]
    plan: str
    plan_fingerprint: str
    micro_batch_seconds: float = Field(description="predicted seconds of its part of a micro-batch, no waiting")
    bound_seconds: float
    peak_bytes: int
    exchange_bytes: int = Field(ge=0, description="bytes of the peak that are there for messages alone")


class FederatedMember(Participant):
    """A device that takes steps of its own in each round; of its budget a part is for Flower's processes."""

    flower_bytes: int = Field(description="of the budget: set aside for Flower's processes on the device")
    rank: int = Field(ge=1, description="of the adapter that it trains")
    adapter_bytes: int = Field(0, ge=0, description="of the tensors that it sends back in a round")
    start_seconds: float = Field(ge=0, description="of a round beside transfers and steps: until its run is ready")
    steps: int = Field(0, ge=0, description="local steps, micro-batches, in a round")
    step_seconds: float | None = Field(
        None, description="predicted seconds of one of them, the mean over those of an update"
    )
    round_seconds: float = Field(0.0, ge=0, description="from when the round begins until its answer has arrived")

    @property
    def takes_part(self) -> bool:
        return bool(self.steps)


class SplitMember(FederatedMember):
    """Such a device that holds the lower layers alone. Those that take part come first, in the order in which they are
    served.
    """

    weight: float = Field(1.0, gt=0, description="of its share of the steps")
    server_plan: str | None = Field(None, description="file of the server's plan for the layers above")
    server_plan_fingerprint: str | None = None
    layers: int = Field(0, ge=0, description="number of the model's lower layers that it holds")
    layer_names: list[str] = Field([], description="the last layer that it holds, and the first one of the server")
    ahead: int = Field(0, ge=0, description="micro-batches whose forward runs before their gradients are waited for")
    up: list[Passed] = Field([], description="activations that pass up over its cut, in this order")
    down: list[Passed] = Field([], description="gradients that pass down")
    server_peak_bytes: int | None = Field(None, description="predicted peak of the server's run")
    exchange_bytes: int = Field(0, ge=0, description="bytes of its peak that are there for messages alone")
    server_exchange_bytes: int = Field(0, ge=0, description="the same of the server's")
    head_seconds: float = Field(0.0, ge=0, description="from when a round begins until it is ready")
    service_seconds: float = Field(0.0, ge=0, description="for which the server is busy with it")
    tail_seconds: float = Field(0.0, ge=0, description="from then until its answer has arrived")
    begin_seconds: float = Field(0.0, ge=0, description="when its service begins, counted from when the round does")


# --- plans ------------------------------------------------------------------------------------------------------------

M = TypeVar("M", bound=PlannedMember)


class BaselineResult(FrozenRecord):
    """A fixed way to share the work, judged in the same terms."""

    makespan_seconds: float | None = Field(description="None: some device cannot hold its part")
    reason: str | None = Field(None, description="why there is no makespan")


class Exactness(FrozenRecord):
    """How far the results of a fleet are those of one process, or of devices that compute all layers."""

    bit_identical: bool = Field(
        description=(
            "whether they are to the bit: messages are exact, and the members' profiles agree in everything that"
            " decides how operators round"
        )
    )
    differences: list[str] = Field([], description="in words, in what the profiles do not agree")


class PlannedFleet(FrozenRecord, Generic[M]):
    """What the plan of every fleet says."""

    version: int = FLEET_VERSION
    fingerprint: str = Field(description="sha256 of everything else here")
    kind: str
    """by which the first bytes of its file tell it from other plans"""
    model: str
    batch: int = Field(description="rows of a micro-batch")
    members: list[M]
    makespan_seconds: float = Field(description="predicted seconds of a step, or a round, as the simulator states them")
    bound_seconds: float = Field(description="no way to share the work and no plans of this class take less")
    gap: float = Field(description="(makespan_seconds - bound_seconds) / makespan_seconds")
    solve_seconds: float

    @property
    def taking(self) -> list[M]:
        """The members that take part, in the order in which they compute or are served."""
        return [member for member in self.members if member.takes_part]


class StepFleet(PlannedFleet[M]):
    """A fleet whose members meet at every step."""

    micro_batches: int = Field(ge=1, description="micro-batches of a step, in all")

    @property
    def chain(self) -> list[M]:
        """The members that compute, in the order in which activations or gradients pass from one to the next."""
        return self.taking


class Baseline(BaselineResult):
    name: Literal["equal shares", "fastest alone"]
    micro_batches: dict[str, int] = Field(description="by member")


class FleetPlan(StepFleet[Member], Exactness):
    kind: Literal["data parallel"] = "data parallel"
    trained_bytes: int = Field(description="bytes of the trained tensors, which pass over every link of the chain")
    compute_seconds: float = Field(description="until the last member has computed its micro-batches")
    exchange_seconds: float = Field(description="from there until every member has the sum")
    update_seconds: float = Field(description="from there until every member has made the update")
    baselines: list[Baseline] = []


class PipelineBaseline(BaselineResult):
    name: Literal["equal layers", "fastest alone"]
    layers: dict[str, int] = Field(description="number of layers by member")


class PipelinePlan(StepFleet[StageMember], Exactness):
    kind: Literal["pipeline"] = "pipeline"
    bits: Literal[0, 4, 8] = Field(0, description="of a number in a message; 0: as it is")
    link_bytes: list[int] = Field([], description="bytes of a step that pass over each cut, both ways together")
    baselines: list[PipelineBaseline] = []


class SidePlan(StepFleet[SideMember]):
    """The plan of a device and a server that train a side network: the device comes first."""

    kind: Literal["mobillm"] = "mobillm"
    members: list[SideMember] = Field(min_length=2, max_length=2)
    bits: Literal[0, 4, 8] = Field(description="of a number in a message; 0: as it is")
    blocks: list[int] = Field(description="indices of the model's blocks whose outputs are sent")
    rank: int = Field(description="width of the side network's adapters")
    message: list[Passed] = Field(description="what passes for a micro-batch, in this order")
    message_bytes: int = Field(description="bytes of that message")
    device_alone_seconds: float | None = Field(
        description="what a step of backpropagation takes the device alone within its budget; None: it does not fit"
    )

    @property
    def bit_identical(self) -> bool:
        """Nothing is computed twice that would have to be equal."""
        return False


class RoundsFleet(PlannedFleet[M]):
    """A fleet whose devices train on data of their own, and meet once a round."""

    steps: int = Field(ge=1, description="local steps, micro-batches, of a round, of all devices together")
    accumulate: int = Field(ge=1, description="steps of an update; each device takes a multiple of it")
    rank: int = Field(ge=1, description="of the fleet's adapter: the largest of those that take part")
    adapter_bytes: int = Field(description="of its tensors")


class FederatedBaseline(BaselineResult):
    name: Literal["equal steps", "fastest alone"]
    steps: dict[str, int] = Field(description="by member")


class FederatedPlan(RoundsFleet[FederatedMember]):
    kind: Literal["federated"] = "federated"
    baselines: list[FederatedBaseline] = []


class SplitServer(FrozenRecord):
    """The machine that computes the upper layers, for one device at a time."""

    device: str = Field(description="the device's name, as its profile has it")
    measured: bool = Field(description="False: its profile is estimated, so that it cannot run this plan")
    budget_bytes: int = Field(description="for a run of the upper layers; Flower's processes there are not counted")
    link: Link
    start_seconds: float = Field(ge=0, description="of a service beside its steps: until a run trains, and ends")


class SplitBaseline(BaselineResult):
    name: Literal["order as described", "one cut for all", "whole models", "without a device"]
    layers: dict[str, int] = Field(description="number of layers by member; without a device by all others")


class SplitPlan(RoundsFleet[SplitMember], Exactness):
    kind: Literal["split federated"] = "split federated"
    server: SplitServer
    order_gap: float = Field(description="the gap where the plans of the stages are given: of the order and the cuts")
    baselines: list[SplitBaseline] = []


AnyFleet = FleetPlan | PipelinePlan | SidePlan | FederatedPlan | SplitPlan
AnyStepFleet = FleetPlan | PipelinePlan | SidePlan
AnyRounds = FederatedPlan | SplitPlan
F = TypeVar("F", FleetPlan, PipelinePlan, SidePlan, FederatedPlan, SplitPlan)
"""a plan of one kind"""
