"""A fleet's plan, of whatever kind, as replicas of a chain of parts: what is said of every device that computes.

What reads a plan without asking for its kind reads these: the simulator checks each part alike, and a run takes its
seat.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tightfit.planner.fleet.schema import (
    AnyFleet,
    AnyStepFleet,
    FederatedPlan,
    Link,
    Passed,
    PipelinePlan,
    PlannedMember,
    SidePlan,
    SplitMember,
    SplitPlan,
)
from tightfit.profiles.schema import Floor
from tightfit.runtime.engine.fleet.message import RECEIVING_DOWN, SENDING, Passing, offsets, paged, ring

PORT = 29400
"""where the members meet unless told otherwise: the port that ``torchrun`` uses too"""
RINGS = 2
"""mobillm: messages that the server receives before it has used up the first of them, and one on its way"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a chain, as the fleet's plan states it."""

    member: str
    server: bool = False
    """whether it is the server's part of the chain of the device `member`, in rounds"""
    link: Link
    plan: str | None
    """file of its plan, beside the fleet's"""
    plan_fingerprint: str | None
    budget_bytes: int
    aside_bytes: int = 0
    """of the budget: for processes beside the run"""
    peak_bytes: int | None
    """of both"""
    exchange_bytes: int = 0
    """for what passes alone"""
    micro_batch_seconds: float | None = None
    forward_seconds: float | None = None
    bound_seconds: float | None = None
    layers: tuple[int, int | None] | None = None
    """indices of its first layer and of the one after its last, None for the end of the model; None: it holds all"""
    ends: tuple[str | None, str | None] = (None, None)
    """names of its first and its last layer; None: not stated"""
    ahead: int = 0
    buffers: int = 1
    """messages from below that it holds at once"""
    up: Sequence[Passed] = ()
    """what it sends to the part above for a micro-batch, in this order"""
    down: Sequence[Passed] = ()
    """what it sends to the part below"""
    labels: int = 0
    """so many tensors at the beginning of a message from below are its batch"""

    @property
    def name(self) -> str:
        """Whose it is, for people."""
        return f"the server, for {self.member}" if self.server else self.member


Chain = list[Part]
"""in the order of the layers"""


def replicas(fleet: AnyFleet) -> list[Chain]:
    """The chains that compute beside one another, in the order of the members that take part."""
    if isinstance(fleet, PipelinePlan):
        stages = [
            _part(
                stage,
                exchange_bytes=stage.exchange_bytes,
                micro_batch_seconds=stage.micro_batch_seconds,
                forward_seconds=stage.forward_seconds,
                layers=(stage.first_layer, stage.last_layer),
                ends=(stage.layer_names[0], stage.layer_names[-1]) if stage.layer_names else ("", ""),
                ahead=stage.ahead,
                up=stage.up,
                down=stage.down,
            )
            for stage in fleet.chain
        ]
        above = [replace(part, buffers=ring(below.ahead)) for below, part in pairwise(stages)]
        return [[*stages[:1], *above]]
    if isinstance(fleet, SplitPlan):
        return [_split(fleet, member) for member in fleet.taking]
    if isinstance(fleet, FederatedPlan):
        return [
            [_part(member, aside_bytes=member.flower_bytes, micro_batch_seconds=member.step_seconds)]
            for member in fleet.taking
        ]
    made = [
        _part(member, exchange_bytes=member.exchange_bytes, micro_batch_seconds=member.micro_batch_seconds)
        for member in fleet.chain
    ]
    if isinstance(fleet, SidePlan):
        device, server = made
        return [[replace(device, up=fleet.message), replace(server, buffers=RINGS, labels=1)]]
    return [[part] for part in made]


def _part(member: PlannedMember, **more: Any) -> Part:
    return Part(
        member=member.name,
        link=member.link,
        plan=member.plan,
        plan_fingerprint=member.plan_fingerprint,
        budget_bytes=member.budget_bytes,
        peak_bytes=member.peak_bytes,
        bound_seconds=member.bound_seconds,
        **more,
    )


def _split(fleet: SplitPlan, member: SplitMember) -> Chain:
    """A device's lower layers, and the server's upper ones."""
    last, first = member.layer_names or ("", "")
    lower = _part(
        member,
        aside_bytes=member.flower_bytes,
        exchange_bytes=member.exchange_bytes,
        layers=(0, member.layers),
        ends=(None, last),
        ahead=member.ahead,
        up=member.up,
    )
    upper = Part(
        member=member.name,
        server=True,
        link=fleet.server.link,
        plan=member.server_plan,
        plan_fingerprint=member.server_plan_fingerprint,
        budget_bytes=fleet.server.budget_bytes,
        peak_bytes=member.server_peak_bytes,
        exchange_bytes=member.server_exchange_bytes,
        layers=(member.layers, None),
        ends=(first, None),
        buffers=ring(member.ahead),
        down=member.down,
    )
    return [lower, upper]


def bits_of(fleet: AnyFleet) -> int:
    """Bits of a number in the messages over a chain's cuts; 0: as it is."""
    return fleet.bits if isinstance(fleet, PipelinePlan | SidePlan) else 0


# --- bytes of messages ------------------------------------------------------------------------------------------------


def passing_of(passed: Sequence[Passed]) -> tuple[Passing, ...]:
    """The tensors of a message as the runtime has them."""
    return tuple(Passing(shape=tuple(one.shape), dtype=one.dtype) for one in passed)


def passed_of(passing: Sequence[Passing]) -> list[Passed]:
    """The tensors of a message as plans have them."""
    return [Passed(shape=list(one.shape), dtype=one.dtype) for one in passing]


def message_bytes(passing: Sequence[Passing], bits: int) -> int:
    """Bytes of a message; of none where nothing passes."""
    return offsets(passing, bits)[1] if passing else 0


def messages_bytes(
    floor: Floor, *, from_below: int = 0, to_below: int = 0, to_above: int = 0, from_above: int = 0, buffers: int = 1
) -> int:
    """Bytes that a part holds for its messages alone, by the bytes of one over each way; 0: it has no such messages.
    `buffers` are those for messages from below.
    """
    if not from_below + to_above:
        return 0
    return (
        floor.transport_bytes
        + buffers * paged(from_below)
        + SENDING * (paged(to_below) + paged(to_above))
        + RECEIVING_DOWN * paged(from_above)
    )


# --- how its members are started --------------------------------------------------------------------------------------


def listener(fleet: AnyStepFleet) -> int:
    """The position in the chain of the member that listens for the others: devices can reach a server, and seldom the
    reverse.
    """
    return 1 if isinstance(fleet, SidePlan) else 0


def member_commands(fleet: AnyStepFleet, folder: str) -> dict[str, str]:
    """The command that runs each member on a device of its own, by member; DATA, OUT and HOST, an address of the
    `listener`, are to be filled in. None for a single member.
    """
    if len(fleet.chain) == 1:
        return {}
    without_data = fleet.chain[-1] if isinstance(fleet, SidePlan) else None
    commands = {}
    for member in fleet.chain:
        data = [] if member is without_data else ["--data", "DATA"]
        words = ["tightfit", "fleet", "run", folder, "--member", member.name, "--at", f"HOST:{PORT}", *data]
        commands[member.name] = shlex.join([*words, "--steps", str(fleet.micro_batches), "-o", "OUT"])
    return commands
