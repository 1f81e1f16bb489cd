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

`FleetPlan` says all of them.

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
from typing import Literal

from pydantic import Field

from tightfit.profiles.schema import FrozenRecord

FLEET_VERSION = 4
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
Kind = Literal["data parallel", "pipeline", "mobillm", "federated", "split federated"]


class Link(FrozenRecord):
    """A member's connection to the network; both directions can be busy at once."""

    up_bytes_per_second: float = Field(gt=0)
    down_bytes_per_second: float = Field(gt=0)
    latency_seconds: float = Field(0.0, ge=0, description="from this member's process to the network, one way")


class Passed(FrozenRecord):
    """A tensor that passes over a cut."""

    shape: list[int]
    dtype: str = Field(description="torch dtype without the prefix")


class Member(FrozenRecord):
    """A device that may take part."""

    name: str
    device: str = Field(description="the device's name, as its profile has it")
    measured: bool = Field(description="False: its profile is estimated, so that it cannot run this plan")
    budget_bytes: int
    link: Link
    aside_bytes: int = Field(0, description="of the budget: set aside for Flower's processes beside the run")
    start_seconds: float = Field(
        0.0, ge=0, description="of a round, or a service, beside transfers and steps: until the run is ready"
    )
    weight: float = Field(1.0, gt=0, description="split rounds: of its share of the micro-batches")
    reason: str | None = Field(None, description="why it takes no part")


class Part(FrozenRecord):
    """What one device computes of a replica, with a plan of its own."""

    member: str = Field(description="name of the device")
    plan: str = Field(
        pattern=rf"^({SERVER}/)?{NAME.pattern}$", description="name of its plan, which lies beside the fleet's"
    )
    plan_fingerprint: str
    peak_bytes: int = Field(description="predicted peak of all that the device's budget is for")
    exchange_bytes: int = Field(0, ge=0, description="bytes of the peak that are there for what passes alone")
    micro_batch_seconds: float = Field(
        description="predicted seconds of the training schedule for one micro-batch, no waiting"
    )
    forward_seconds: float | None = Field(
        None, description="predicted seconds of the forward alone, of a part that holds some of the layers"
    )
    bound_seconds: float = Field(description="no plan of the class takes less for a micro-batch within its budget")
    layers: list[int] = Field(
        [], description="indices in the profile of its first layer and of the one after its last; empty: of no cut"
    )
    layer_names: list[str] = Field([], description="its first and its last layer")
    ahead: int = Field(0, ge=0, description="micro-batches whose forward runs before their gradients are waited for")
    up: list[Passed] = Field([], description="what it sends to the part above for a micro-batch, in this order")
    down: list[Passed] = Field([], description="gradients that it sends to the part below")


class Turn(FrozenRecord):
    """How a replica has its round, in seconds; those with a server have it one after the other."""

    head_seconds: float = Field(ge=0, description="from when a round begins until it is ready")
    begin_seconds: float = Field(ge=0, description="from when a round begins until its steps begin")
    service_seconds: float = Field(ge=0, description="of its steps, and of the start of the server's run")
    tail_seconds: float = Field(ge=0, description="from then until its answer has arrived")

    @property
    def end_seconds(self) -> float:
        """When its steps have been taken."""
        return self.begin_seconds + self.service_seconds

    @property
    def answered_seconds(self) -> float:
        """When its answer has arrived."""
        return self.end_seconds + self.tail_seconds


class Replica(FrozenRecord):
    """A chain of parts over which activations pass up and gradients down, and its share of the work."""

    parts: list[Part] = Field(min_length=1)
    first: int = Field(0, ge=0, description="number of its first micro-batch in a step, from 0")
    micro_batches: int = Field(ge=1, description="of a step or a round")
    gradients: Shelf = Field("disk", description="where its gradients wait until they are added up")
    states: Shelf = Field("disk", description="where the optimizer's states lie between the steps of several replicas")
    update_seconds: float = Field(0.0, ge=0, description="of the optimizer's arithmetic after gradients are added up")
    rank: int = Field(0, ge=0, description="rounds: of the adapter that it trains")
    adapter_bytes: int = Field(0, ge=0, description="rounds: of the tensors that its device sends back")
    step_seconds: float = Field(
        0.0, ge=0, description="rounds: predicted seconds of a micro-batch, the mean over those of an update"
    )
    bound_seconds: float = Field(0.0, ge=0, description="rounds: no plans within the budgets take less for one")
    turn: Turn | None = Field(None, description="rounds: when it does what")


class Baseline(FrozenRecord):
    """A fixed way to share the work, judged in the same terms."""

    name: str
    makespan_seconds: float | None = Field(description="None: some device cannot hold its part")
    shares: dict[str, int] = Field(
        {}, description="by member: of the micro-batches, or of the layers where these are cut"
    )
    reason: str | None = Field(None, description="why there is no makespan")


class FleetPlan(FrozenRecord):
    """Who of a fleet computes what, within which budget, and when all are done."""

    version: int = FLEET_VERSION
    fingerprint: str = Field(description="sha256 of everything else here")
    kind: Kind
    """by which the first bytes of its file tell it from other plans"""
    model: str
    batch: int = Field(description="rows of a micro-batch")
    micro_batches: int = Field(ge=1, description="of a step or a round, of all replicas together")
    accumulate: int = Field(ge=1, description="micro-batches of an update: in a step all, in a round a replica's own")
    members: list[Member] = Field(description="devices that were described, whether they take part or not")
    replicas: list[Replica] = Field(description="in the order in which they add up, or are served")
    bits: Literal[0, 4, 8] = Field(0, description="of a number in a message over a cut; 0: as it is")
    blocks: list[int] = Field([], description="mobillm: indices of the model's blocks whose outputs are sent")
    rank: int = Field(0, description="of the adapter: in rounds the largest; in mobillm of the side network")
    trained_bytes: int = Field(description="bytes of the trained tensors")
    makespan_seconds: float = Field(description="predicted seconds of a step, or a round, as the simulator states them")
    compute_seconds: float = Field(0.0, description="several replicas in a step: until the last one has computed")
    exchange_seconds: float = Field(0.0, description="from there until every member has the sum")
    update_seconds: float = Field(0.0, description="from there until every member has made the update")
    bound_seconds: float = Field(description="no way to share the work and no plans of this class take less")
    gap: float = Field(description="(makespan_seconds - bound_seconds) / makespan_seconds")
    order_gap: float = Field(
        0.0, description="split rounds: the gap of cuts and order where the parts' plans are given"
    )
    solve_seconds: float
    bit_identical: bool = Field(
        False,
        description=(
            "whether results are those of one process, or of devices that compute all layers, to the bit: messages are"
            " exact, and the members' profiles agree in everything that decides how operators round"
        ),
    )
    differences: list[str] = Field([], description="in words, in what the profiles do not agree")
    baselines: list[Baseline] = []

    @property
    def in_rounds(self) -> bool:
        """Whether devices train on data of their own and meet once a round, where adapters are averaged."""
        return self.kind in ROUNDS

    @property
    def one_way(self) -> bool:
        """Whether messages pass up alone."""
        return self.kind == "mobillm"

    @property
    def cut(self) -> bool:
        """Whether each part holds some of the layers."""
        return self.kind in ("pipeline", "split federated")

    @property
    def parts(self) -> list[Part]:
        """Those of all replicas, in the order in which activations or gradients pass from one to the next."""
        return [part for replica in self.replicas for part in replica.parts]

    @property
    def names(self) -> list[str]:
        """Of the devices that take part, in the order of the replicas; in rounds without the server."""
        computing = [replica.parts[:1] if self.in_rounds else replica.parts for replica in self.replicas]
        return [part.member for parts in computing for part in parts]

    @property
    def idle(self) -> list[Member]:
        """Members that take no part."""
        computing = {part.member for part in self.parts}
        return [member for member in self.members if member.name not in computing]

    def member(self, name: str) -> Member:
        """The device of that name."""
        return next(member for member in self.members if member.name == name)

    def replica(self, name: str) -> Replica:
        """That in which the device of that name computes its first layers."""
        return next(replica for replica in self.replicas if name in [part.member for part in replica.parts])

    def part(self, name: str) -> Part:
        """What the device of that name computes."""
        return next(part for part in self.parts if part.member == name)


ROUNDS = ("federated", "split federated")
"""kinds of fleets that meet once a round"""
