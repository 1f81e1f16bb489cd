"""A member's seat in a fleet: where the members meet, and what this one does there; taking it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.fleet.exchange import Exchange, Share, pieces_of
from tightfit.runtime.engine.fleet.message import Passing
from tightfit.runtime.engine.fleet.shelf import Buffers, DiskShelf, MemoryShelf, Shelf
from tightfit.runtime.engine.fleet.stage import Boundary, Stage
from tightfit.runtime.engine.fleet.transport import Transport, read_key
from tightfit.runtime.engine.kernels.optimizer import AdamW

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExchangePart:
    """What a member does that computes some of the micro-batches and exchanges gradients."""

    first: int
    count: int
    """as in `Share`"""
    gradients: str
    states: str
    """"memory" or "disk": where they lie"""
    piece_bytes: int
    buffers: int
    """pieces that are held at once"""


@dataclass(frozen=True, kw_only=True)
class StagePart:
    """What a member does that computes some of the layers; as in `Stage`."""

    below: Boundary | None
    above: Boundary | None
    ahead: int
    ahead_below: int
    bits: int
    gathers: bool = True
    """whether the first member saves what all have trained; else each its own part alone"""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What a training process must know to take part; it stands in the job's header."""

    members: list[str]
    """names of those that compute, in the order of the chain"""
    rank: int
    """this member's place in it, from 0"""
    address: str
    port: int
    """where the members meet: one of them listens there"""
    timeout: float
    """seconds to wait for the others to appear, and later for one message"""
    micro_batches: int
    """of a step of the fleet"""
    part: ExchangePart | StagePart
    exact: bool
    """whether all members must round alike, so that results are those of one process to the bit"""
    key: str
    """path of the file with the key by which the members know each other"""
    plan: str = ""
    """fingerprint of the fleet's plan"""
    agent: bool = False
    """whether ``torchrun`` has opened the store at which the members meet"""
    attempt: int = 0
    """how often it has started the members again"""
    listens: int = 0
    """place in the chain of the member that listens where they meet"""

    @property
    def in_turn(self) -> bool:
        """Whether the members compute layers of one model, one after the other."""
        return isinstance(self.part, StagePart)

    def transport(self, stopping: Callable[[], bool], say: Callable[[str], None]) -> Transport:
        """Meet the other members. Raises RunError where they do not meet, or `stopping` says so meanwhile; `say` is told who
        is waited for.
        """
        return Transport(
            self.members,
            self.rank,
            self.address,
            self.port,
            key=read_key(self.key),
            timeout=self.timeout,
            plan=self.plan,
            agent=self.agent,
            attempt=self.attempt,
            listens=self.listens,
            stopping=stopping,
            say=say,
        )


def seat_of(header: Mapping[str, Any]) -> Seat:
    """The seat that a job's header holds as a dict."""
    part = header["part"]
    made: ExchangePart | StagePart
    if "gradients" in part:
        made = ExchangePart(**part)
    else:
        made = StagePart(**{**part, "below": _boundary(part["below"]), "above": _boundary(part["above"])})
    return Seat(**{**header, "part": made})


def _boundary(said: Mapping[str, Any] | None) -> Boundary | None:
    if said is None:
        return None

    def passing(listed: Sequence[Mapping[str, Any]]) -> tuple[Passing, ...]:
        return tuple(Passing(shape=tuple(one["shape"]), dtype=one["dtype"]) for one in listed)

    return Boundary(up=passing(said["up"]), down=passing(said["down"]))


def join_pipeline(seat: Seat, stopping: Callable[[], bool], say: Callable[[str], None]) -> Stage:
    """Meet the other members of a pipeline, and make room for messages. Raises RunError as `Seat.transport`."""
    part = seat.part
    assert isinstance(part, StagePart)
    return Stage(
        seat.transport(stopping, say),
        seat.micro_batches,
        part.below,
        part.above,
        ahead=part.ahead,
        ahead_below=part.ahead_below,
        bits=part.bits,
        gathers=part.gathers,
    )


def join(
    seat: Seat,
    optimizer: AdamW,
    shapes: Sequence[Sequence[int]],
    directory: str,
    channel: TransferChannel,
    *,
    parameter: Callable[[int], Tensor],
    keep: Callable[[int, Tensor], None],
    stopping: Callable[[], bool],
    say: Callable[[str], None],
) -> Exchange:
    """Reserve what an exchange needs, files in `directory`, and meet the other members. `shapes`: of the trained
    tensors, in order.

    Raises RunError where the disk lacks the space or the members do not meet, or `stopping` says so meanwhile.
    """
    part = seat.part
    assert isinstance(part, ExchangePart)
    pieces = pieces_of(shapes, part.piece_bytes)

    def shelf(where: str, rows: int) -> Shelf:
        return MemoryShelf(pieces, rows) if where == "memory" else DiskShelf(pieces, rows, directory)

    return Exchange(
        optimizer,
        Share(first=part.first, count=part.count, micro_batches=seat.micro_batches),
        seat.transport(stopping, say),
        pieces,
        Buffers(pieces.largest, part.buffers),
        gradients=shelf(part.gradients, Exchange.rows(seat.rank, part.count)),
        states=shelf(part.states, 2),
        gradients_on_disk=part.gradients == "disk",
        channel=channel,
        parameter=parameter,
        keep=keep,
    )
