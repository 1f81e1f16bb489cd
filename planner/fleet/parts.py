"""What the parts of a fleet's plan pass to one another, what they hold for that, and how members are started."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise

from tightfit.planner.fleet.schema import FleetPlan, Passed, Replica
from tightfit.profiles.schema import Floor
from tightfit.runtime.engine.fleet.message import RECEIVING_DOWN, SENDING, Passing, offsets, paged, ring

PORT = 29400
"""where the members meet unless told otherwise: the port that ``torchrun`` uses too"""
RINGS = 2
"""mobillm: messages that the server receives before it has used up the first of them, and one on its way"""


def buffers_of(fleet: FleetPlan, replica: Replica, place: int) -> int:
    """Messages from below that the part at `place` of a replica holds at once."""
    if not place:
        return 1
    return RINGS if fleet.one_way else ring(replica.parts[place - 1].ahead)


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


def link_bytes(fleet: FleetPlan) -> list[int]:
    """Bytes of an update that pass over each cut of a fleet's first replica, both ways together."""
    parts = fleet.replicas[0].parts
    return [
        fleet.accumulate * sum(message_bytes(passing_of(passed), fleet.bits) for passed in (below.up, above.down))
        for below, above in pairwise(parts)
    ]


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


def listener(fleet: FleetPlan) -> int:
    """The position in the chain of the member that listens for the others: devices can reach a server, and seldom the
    reverse.
    """
    return 1 if fleet.one_way else 0


def member_commands(fleet: FleetPlan, folder: str) -> dict[str, str]:
    """The command that runs each member on a device of its own, by member; DATA, OUT and HOST, an address of the
    `listener`, are to be filled in. None for a single member.
    """
    names = fleet.names
    if len(names) == 1:
        return {}
    without_data = names[-1] if fleet.one_way else None
    commands = {}
    for name in names:
        data = [] if name == without_data else ["--data", "DATA"]
        words = ["tightfit", "fleet", "run", folder, "--member", name, "--at", f"HOST:{PORT}", *data]
        commands[name] = shlex.join([*words, "--steps", str(fleet.micro_batches), "-o", "OUT"])
    return commands
