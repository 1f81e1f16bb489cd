"""A run as one member of a fleet: its seat, made of the fleet's plan, and what its report says of the fleet."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.planner.fleet.parts import PORT, buffers_of, listener, passing_of
from tightfit.planner.fleet.schema import BUFFERS, PIECE_BYTES, FleetPlan, Replica
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.fleet.exchange import ExchangePart
from tightfit.runtime.engine.fleet.meeting import listening
from tightfit.runtime.engine.fleet.seat import Seat
from tightfit.runtime.engine.fleet.stage import Boundary, StagePart
from tightfit.runtime.session.options import RunOptions

SIDE_RESULT = "a side network, which the server trains and saves in its folder's side/; no adapter of the model"
LEAST_TIMEOUT, STEPS_WAITED = 600.0, 10
"""seconds, and makespans of a step, that a member waits for another at least"""


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A member that runs: its seat, and the fleet's figures for its report."""

    name: str
    seat: Seat | None
    """None for the only member, which runs its plan by itself"""
    figures: dict[str, Any] | None


def member_options(options: RunOptions, fleet: FleetPlan, member: Membership) -> RunOptions:
    """The options of a fleet's run for one member, which has a folder of its own in theirs. Of members that each have
    the whole model only the first evaluates, of those that have parts of it all do.
    """
    evaluates = fleet.cut or member.name == fleet.names[0]
    held_out = options.eval_data if evaluates else None
    return options.but(member=member, out=Path(options.out) / member.name, eval_data=held_out)


def membership(
    fleet: FleetPlan,
    name: str,
    address: str,
    port: int,
    key: Path,
    timeout: float | None = None,
) -> Membership:
    """The membership of the member called `name`, which meets the others at `address` and `port`.

    `key`: the file with the fleet's key, beside its plan; `timeout`: seconds to wait for the others, by default ten
    steps and at least ten minutes. Raises InputError for a name that the fleet lacks, and for a member that takes no
    part.
    """
    names = fleet.names
    if name not in names:
        idle = any(member.name == name for member in fleet.members)
        why = "takes no part in this plan" if idle else "is not in this plan"
        raise InputError(f"member {name!r} {why}; those that compute are {', '.join(names)}")
    if len(names) == 1:
        return Membership(name=name, seat=None, figures=None)
    rank, replica, planned = names.index(name), fleet.replica(name), fleet.part(name)
    busy = planned.micro_batch_seconds + ((planned.forward_seconds or 0.0) if planned.ahead else 0.0)
    figures: dict[str, Any] = {
        "member": name,
        "members": names,
        "micro_batches": fleet.micro_batches,
        "seconds": fleet.makespan_seconds,
        "exchange_seconds": max(0.0, fleet.makespan_seconds - fleet.micro_batches * busy),
        "update_seconds": fleet.update_seconds,
        "share": [replica.first, replica.micro_batches],
    }
    part: ExchangePart | StagePart
    if len(replica.parts) == 1:
        part = ExchangePart(
            first=replica.first,
            count=replica.micro_batches,
            gradients=replica.gradients,
            states=replica.states,
            piece_bytes=PIECE_BYTES,
            buffers=BUFFERS,
        )
        figures["exchange_seconds"] = fleet.exchange_seconds
    else:
        # In mobillm each part saves what it has trained itself.
        part = stage_part(fleet, replica, rank, gathers=not fleet.one_way)
        figures |= {"result": SIDE_RESULT} if fleet.one_way else {"layers": planned.layer_names}
    seat = Seat(
        members=names,
        rank=rank,
        address=address,
        port=port,
        timeout=max(LEAST_TIMEOUT, STEPS_WAITED * fleet.makespan_seconds) if timeout is None else timeout,
        micro_batches=fleet.micro_batches,
        part=part,
        exact=fleet.bit_identical,
        plan=fleet.fingerprint,
        key=str(key.absolute()),
        listens=listener(fleet),
    )
    return Membership(name=name, seat=seat, figures=figures)


def address_of(option: str, text: str, port: int = PORT) -> tuple[str, int]:
    """The host and port of HOST[:PORT], as `option` has it; `port` where it names none. Raises InputError for anything
    else.
    """
    host, colon, number = text.rpartition(":")
    if not colon:
        return text, port
    if not host or not number.isdecimal() or not 0 < int(number) < 1 << 16:
        raise InputError(f"{option} {text}: give HOST or HOST:PORT, such as 192.168.0.10:{PORT}")
    return host, int(number)


def free_port(count: int = 1) -> int:
    """The first of so many neighbouring ports of this machine at which nobody listens."""
    while True:
        with ExitStack() as probes:
            first = 0
            try:
                for place in range(count):
                    probe = probes.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", first + place if first else 0))
                    first = first or int(probe.getsockname()[1])
            except (OSError, OverflowError):
                continue
            return first


def check_listens(fleet: FleetPlan, name: str, address: str, port: int) -> None:
    """Raise InputError where `name` is the member that the others meet at, and cannot listen at the address given."""
    names = fleet.names
    if names[listener(fleet)] == name:
        for other in range(len(names) - 1):
            listening(address, port + other, f"member {name!r}, this one,").close()


def stage_part(fleet: FleetPlan, replica: Replica, rank: int, *, gathers: bool) -> StagePart:
    """What the part at `rank` of a replica does. `gathers`: the first one saves what all have trained."""
    parts = replica.parts

    def boundary(lower: int) -> Boundary | None:
        """What passes between the part at `lower` and the next."""
        if not 0 <= lower < len(parts) - 1:
            return None
        return Boundary(up=passing_of(parts[lower].up), down=passing_of(parts[lower + 1].down))

    return StagePart(
        below=boundary(rank - 1),
        above=boundary(rank),
        ahead=parts[rank].ahead,
        ahead_below=buffers_of(fleet, replica, rank) - 1,
        bits=fleet.bits,
        gathers=gathers,
    )
