"""A member of a pipeline: hands activations up and gradients down over the cuts to its neighbours.

Each member computes a run of neighbouring layers for all micro-batches of a step. A **message** holds what passes over
one cut for one micro-batch in one direction (`tightfit.runtime.engine.fleet.message`). Messages are received into a
ring of buffers before they are asked for, and sent from a pair of buffers while the member computes on, as the
transfers of the disk are.

A member that runs ahead takes the forward of `ahead` micro-batches before it trains the first of them, so that the
members above have work while it waits. For a micro-batch taken ahead, training runs the forward again from the received
message, which is kept until then, and sends nothing up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tightfit.runtime.engine.fleet.message import RECEIVING_DOWN, SENDING, Passing, offsets, paged, put, ring, take
from tightfit.runtime.engine.fleet.role import Exchanged, JoinedRole, Share
from tightfit.runtime.engine.fleet.transport import Pending, Transport
from tightfit.runtime.engine.weights.safetensors_file import TensorItem

if TYPE_CHECKING:
    from torch import Tensor

UP, DOWN, CLOSE = 2, 3, 4
"""tags of messages"""
Direction = Literal["up", "down"]
Kind = Literal["train", "ahead", "evaluate"]
OWN = ("graph", "adapter")
"""conditions of a run in which the members differ, since each has layers of its own"""
CHUNK = 1 << 20
"""bytes of another member's trained tensors that are held at a time"""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """What passes over a cut for one micro-batch."""

    up: tuple[Passing, ...]
    down: tuple[Passing, ...]
    """nothing where no gradient comes back"""


@dataclass(frozen=True, kw_only=True)
class StagePart:
    """What a member does that computes some of the layers."""

    below: Boundary | None
    above: Boundary | None
    ahead: int
    """micro-batches whose forward runs before their gradients are waited for"""
    ahead_below: int
    """those of the member below"""
    bits: int
    """of a number in a message; 0: as it is"""
    gathers: bool = True
    """whether the first member saves what all have trained; else each its own part alone"""

    @property
    def one_way(self) -> bool:
        """Whether no gradient comes back: the first member is a device with the data, the last one a server that trains
        a side network from what it sends, the labels first.
        """
        return not any(side and side.down for side in (self.below, self.above))


class IncomingMessages:
    """Receives one message after the other from a peer, into a ring of buffers."""

    def __init__(
        self, transport: Transport, peer: int, tag: int, passing: Sequence[Passing], bits: int, buffers: int
    ) -> None:
        self._transport, self._peer, self._tag, self._bits = transport, peer, tag, bits
        self.passing = passing
        self._offsets, self.bytes = offsets(passing, bits)
        self._buffers = _buffers(self.bytes, buffers)
        self._pending: dict[int, Pending] = {}
        """by the number of the message: receives that have begun"""
        self._first = self._next = self._last = 0
        """numbers of the oldest message that is kept, of the next one to begin to receive, and of the end of those that
        are known to come
        """
        self.waited = 0.0
        """seconds spent waiting for messages"""

    def expect(self, count: int) -> None:
        """So many messages more will come."""
        self._last += count
        self._ask()

    def take(self, message: int, number: int, out: Tensor) -> None:
        """Copy a tensor of a message, by its place in it, to `out`; waits for the message."""
        if message in self._pending:
            before = time.perf_counter()
            self._pending.pop(message).wait()
            self.waited += time.perf_counter() - before
        at = self._offsets[number]
        room = self._buffers[message % len(self._buffers)]
        take(room[at : at + self.passing[number].wire_bytes(self._bits)], out, self._bits)

    def done(self, message: int) -> None:
        """The oldest message is used up."""
        assert message == self._first
        self._first += 1
        self._ask()

    def _ask(self) -> None:
        while self._next < min(self._last, self._first + len(self._buffers)):
            buffer = self._buffers[self._next % len(self._buffers)]
            self._pending[self._next] = self._transport.receive(buffer, self._peer, self._tag)
            self._next += 1


class Outgoing:
    """Sends one message after the other to a peer."""

    def __init__(self, transport: Transport, peer: int, tag: int, passing: Sequence[Passing], bits: int) -> None:
        self._transport, self._peer, self._tag, self._bits = transport, peer, tag, bits
        self.passing = passing
        self._offsets, self.bytes = offsets(passing, bits)
        self._buffers = _buffers(self.bytes, SENDING)
        self._pending: list[Pending | None] = [None] * SENDING
        self._message = 0
        self.waited = 0.0

    def put(self, number: int, tensor: Tensor) -> None:
        """Copy a tensor, by its place in the message, into it; the last one sends the message off."""
        slot = self._message % SENDING
        self._wait(slot)
        at = self._offsets[number]
        put(tensor, self._buffers[slot][at : at + self.passing[number].wire_bytes(self._bits)], self._bits)
        if number == len(self.passing) - 1:
            self._pending[slot] = self._transport.send(self._buffers[slot], self._peer, self._tag)
            self._message += 1

    def drain(self) -> None:
        for slot in range(SENDING):
            self._wait(slot)

    def _wait(self, slot: int) -> None:
        before, pending = time.perf_counter(), self._pending[slot]
        if pending is not None:
            pending.wait()
            self._pending[slot] = None
            self.waited += time.perf_counter() - before


def _buffers(size: int, count: int) -> list[Tensor]:
    """Buffers in mappings of their own, so that they leave no holes in the heap."""
    import torch

    from tightfit.runtime.engine.cpu.pages import make_pages

    whole = torch.frombuffer(make_pages(count * paged(size)), dtype=torch.uint8)
    return [whole[one * paged(size) :][:size] for one in range(count)]


class PipelineStage(JoinedRole):
    """A member's place in the pipeline. The operators `tightfit.send` and `tightfit.receive` call `send` and
    `receive`.
    """

    apart = True

    def __init__(self, transport: Transport, part: StagePart, micro_batches: int, *, exact: bool) -> None:
        super().__init__(transport, exact=exact)
        rank, below, above, bits = transport.rank, part.below, part.above, part.bits
        self.share = Share(first=0, count=micro_batches, micro_batches=micro_batches)
        self._gathers = part.gathers
        self._ahead = min(part.ahead, micro_batches) if above else 0
        self._first, self._last = below is None, above is None
        self.knows_losses = self._last
        self._from_below = below and IncomingMessages(transport, rank - 1, UP, below.up, bits, ring(part.ahead_below))
        self._to_below = Outgoing(transport, rank - 1, DOWN, below.down, bits) if below and below.down else None
        self._to_above = above and Outgoing(transport, rank + 1, UP, above.up, bits)
        self._from_above = (
            IncomingMessages(transport, rank + 1, DOWN, above.down, bits, RECEIVING_DOWN)
            if above and above.down
            else None
        )
        self._judge = len(transport.members) - 1
        """place of the member that knows the result of an evaluation"""
        self._kind: Kind = "train"
        self._up = self._down = 0
        """numbers, since the run began, of the messages of the current micro-batch: of activations, of gradients"""
        self._base_up = self._base_down = 0
        """the same at the beginning of the step"""
        self._losses: list[float] = []
        self._waited = 0.0

    # --- the order of a step ---------------------------------------------------------------------------------------

    def agree(self, settings: Mapping[str, Any], held_out: str | None, out: str, *, resume: bool) -> None:
        """The members have layers of their own, and evaluate together."""
        same = {name: value for name, value in settings.items() if name not in OWN}
        super().agree({**same, "held-out data": held_out}, held_out, out, resume=resume)

    def passes(self, step: int) -> Iterator[tuple[int, bool]]:
        """Also the forwards of other micro-batches that are due before and after it."""
        place = (step - 1) % self.share.micro_batches
        if place == 0:
            self._begin_step()
            for other in range(step, step + self._ahead):
                yield self._begun(other, "ahead"), False
        yield self._begun(step, "train"), True
        if self._ahead and place + self._ahead < self.share.micro_batches:
            yield self._begun(step + self._ahead, "ahead"), False

    def _begin_step(self) -> None:
        self._losses = []
        self._waited = self.waited
        self._expect(up=self.share.micro_batches, down=self.share.micro_batches)

    def _expect(self, *, up: int, down: int) -> None:
        if self._from_below:
            self._from_below.expect(up)
        if self._from_above and down:
            self._from_above.expect(down)

    def _begun(self, step: int, kind: Kind) -> int:
        """Begin micro-batch `step` of the run, counted from 1: train it, or take its forward ahead."""
        self._kind = kind
        place = (step - 1) % self.share.micro_batches
        self._up, self._down = self._base_up + place, self._base_down + place
        return step

    def begin_evaluation(self) -> None:
        self._kind = "evaluate"
        self._expect(up=1, down=0)
        self._up = self._base_up
        self._base_up += 1

    # --- called by operators ---------------------------------------------------------------------------------------

    def send(self, tensor: Tensor, direction: Direction, number: int) -> None:
        outgoing = self._to_above if direction == "up" else self._to_below
        assert outgoing
        if direction == "up" and self._kind == "train" and self._ahead:
            return  # sent when the forward was taken ahead
        outgoing.put(number, tensor)

    def receive(self, out: Tensor, direction: Direction, number: int) -> None:
        incoming = self._from_below if direction == "up" else self._from_above
        assert incoming
        message = self._up if direction == "up" else self._down
        incoming.take(message, number, out)
        if number == len(incoming.passing) - 1 and self._kind != "ahead":
            incoming.done(message)

    # --- between micro-batches -------------------------------------------------------------------------------------

    def told(self, loss: float) -> None:
        """Only that of the last member means anything."""
        self._losses.append(loss)

    def finish(self, step: int, *, stop: bool) -> Exchanged:
        """The last member tells the losses, and all whether one of them was asked to end."""
        import torch

        self._base_up += self.share.micro_batches
        self._base_down += self.share.micro_batches
        for outgoing in (self._to_above, self._to_below):
            if outgoing:
                outgoing.drain()
        begun = time.perf_counter()
        # Whether somebody was asked to end, then the losses.
        told = torch.zeros(1 + self.share.micro_batches, dtype=torch.float64)
        told[0] = float(stop)
        rank = self.transport.rank
        if not self._first:
            self.transport.receive(told, rank - 1, CLOSE).wait()
            told[0] = max(float(told[0]), float(stop))
        if self._last:
            told[1:] = torch.tensor(self._losses, dtype=torch.float64)
        else:
            self.transport.send(told, rank + 1, CLOSE).wait()
            self.transport.receive(told, rank + 1, CLOSE).wait()
        if not self._first:
            self.transport.send(told, rank - 1, CLOSE).wait()
        waited = self.waited - self._waited + time.perf_counter() - begun
        losses = [float(one) for one in told[1:]]
        return Exchanged(losses=losses, labels=0.0, stop=bool(told[0]), exchange_seconds=waited, update_seconds=0.0)

    @property
    def waited(self) -> float:
        """Seconds that this member has waited for messages, and for room to send."""
        sides = (self._from_below, self._to_below, self._to_above, self._from_above)
        return sum(side.waited for side in sides if side)

    def agreed(self, result: dict[str, Any]) -> dict[str, Any]:
        if self.transport.rank != self._judge:
            told: dict[str, Any] = self.transport.receive_json(self._judge)
            return told
        for rank in range(len(self.transport.members)):
            if rank != self._judge:
                self.transport.send_json(result, rank)
        return result

    # --- the whole of what was trained -----------------------------------------------------------------------------

    def gathered(self, items: Callable[[], Iterator[TensorItem]]) -> list[TensorItem]:
        """The first member saves what all have; the others send it their own."""
        if not self._gathers:
            return []
        if not self._first:
            self.transport.send_json([[one.name, one.dtype, one.shape] for one in items()], 0)
            for item in items():
                self.transport.send_parts(item.chunks(), 0)
            return []
        # Of all others, in the order of the layers; each can be read once, in this order.
        result = []
        for rank in range(1, len(self.transport.members)):
            for name, dtype, shape in self.transport.receive_json(rank):
                item = TensorItem(name=name, dtype=dtype, shape=shape, chunks=lambda: ())
                result.append(replace(item, chunks=partial(self.transport.receive_parts, item.bytes, rank, CHUNK)))
        return result
