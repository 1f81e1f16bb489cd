"""A member's seat in a fleet: which member it is, what it computes, where its gradients and states lie; taking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.runtime.engine.device.channels import Channel
from tightfit.runtime.engine.fleet.exchange import Exchange, Share, pieces_of
from tightfit.runtime.engine.fleet.shelf import Buffers, DiskShelf, MemoryShelf, Shelf
from tightfit.runtime.engine.fleet.transport import Transport
from tightfit.runtime.engine.kernels.optimizer import AdamW

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What a training process must know to take part; it stands in the job's header."""

    members: list[str]
    """names of those that compute, in the order of the chain"""
    rank: int
    """this member's place in it, from 0"""
    address: str
    port: int
    """where the members meet: the first one listens there"""
    timeout: float
    """seconds to wait for the others to appear, and later for one message"""
    first: int
    count: int
    micro_batches: int
    """as in `Share`"""
    gradients: str
    states: str
    """"memory" or "disk": where they lie"""
    piece_bytes: int
    buffers: int
    """pieces that are held at once"""
    exact: bool
    """whether all members must round alike, so that results are those of one process to the bit"""
    agent: bool = False
    """whether ``torchrun`` has opened the store at which the members meet"""
    attempt: int = 0
    """how often it has started the members again"""
    interface: str = ""
    """network device to use; "": the one that leads to `address`"""

    @property
    def share(self) -> Share:
        return Share(first=self.first, count=self.count, micro_batches=self.micro_batches)


def join(
    seat: Seat,
    optimizer: AdamW,
    shapes: Sequence[Sequence[int]],
    directory: str,
    channel: Channel,
    *,
    parameter: Callable[[int], Tensor],
    keep: Callable[[int, Tensor], None],
    stopping: Callable[[], bool],
) -> Exchange:
    """Reserve what an exchange needs, files in `directory`, and meet the other members. `shapes`: of the trained
    tensors, in order.

    Raises RunError where the disk lacks the space or the members do not meet, or `stopping` says so meanwhile.
    """
    pieces = pieces_of(shapes, seat.piece_bytes)

    def shelf(where: str, rows: int) -> Shelf:
        return MemoryShelf(pieces, rows) if where == "memory" else DiskShelf(pieces, rows, directory)

    return Exchange(
        optimizer,
        seat.share,
        Transport(
            seat.members,
            seat.rank,
            seat.address,
            seat.port,
            timeout=seat.timeout,
            agent=seat.agent,
            attempt=seat.attempt,
            interface=seat.interface,
            stopping=stopping,
        ),
        pieces,
        Buffers(pieces.largest, seat.buffers),
        gradients=shelf(seat.gradients, Exchange.rows(seat.rank, seat.count)),
        states=shelf(seat.states, 2),
        gradients_on_disk=seat.gradients == "disk",
        channel=channel,
        parameter=parameter,
        keep=keep,
    )
