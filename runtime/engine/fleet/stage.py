"""A member of a pipeline: hands activations up and gradients down over the cuts to its neighbours.

Each member computes a run of neighbouring layers for all micro-batches of a step. A **message** holds what passes over one
cut for one micro-batch in one direction (`tightfit.runtime.engine.fleet.message`). Messages are received into a ring of
buffers before they are asked for, and sent from a pair of buffers while the member computes on, as the transfers of the
disk are.

A member that runs ahead takes the forward of `ahead` micro-batches before it trains the first of them, so that the members
above have work while it waits. For a micro-batch taken ahead, training runs the forward again from the received message,
which is kept until then, and sends nothing up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tightfit.runtime.engine.fleet.exchange import Exchanged, Share
from tightfit.runtime.engine.fleet.message import RECEIVING_DOWN, SENDING, Passing, offsets, paged, put, ring, take
from tightfit.runtime.engine.fleet.transport import Pending, Transport
from tightfit.runtime.engine.weights.safetensors_file import TensorItem

if TYPE_CHECKING:
    from torch import Tensor

UP, DOWN, CLOSE = 2, 3, 4
"""tags of messages"""
Direction = Literal["up", "down"]
Kind = Literal["train", "ahead", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """What passes over a cut for one micro-batch."""

    up: tuple[Passing, ...]
    down: tuple[Passing, ...]
    """nothing where no gradient comes back"""


class Incoming:
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


class Stage:
    """A member's place in the pipeline. The operators `tightfit.send` and `tightfit.receive` call `send` and `receive`."""

    def __init__(
        self,
        transport: Transport,
        micro_batches: int,
        below: Boundary | None,
        above: Boundary | None,
        *,
        ahead: int,
        ahead_below: int,
        bits: int,
        gathers: bool = True,
    ) -> None:
        """`gathers`: whether the first member saves what all have trained; else each its own part alone."""
        rank = transport.rank
        self.gathers = gathers
        self.transport, self.micro_batches = transport, micro_batches
        self.ahead = min(ahead, micro_batches) if above else 0
        self.first, self.last = below is None, above is None
        self.from_below = below and Incoming(transport, rank - 1, UP, below.up, bits, ring(ahead_below))
        self.to_below = Outgoing(transport, rank - 1, DOWN, below.down, bits) if below and below.down else None
        self.to_above = above and Outgoing(transport, rank + 1, UP, above.up, bits)
        self.from_above = (
            Incoming(transport, rank + 1, DOWN, above.down, bits, RECEIVING_DOWN) if above and above.down else None
        )
        """None also where messages pass one way only, from a device to the server that trains a side network"""
        self._kind: Kind = "train"
        self._up = self._down = 0
        """numbers, since the run began, of the messages of the current micro-batch: of activations, of gradients"""
        self._base_up = self._base_down = 0
        """the same at the beginning of the step"""
        self._losses: list[float] = []
        self._waited = 0.0

    # --- the order of a step ---------------------------------------------------------------------------------------

    @property
    def share(self) -> Share:
        """Every member computes all micro-batches."""
        return Share(first=0, count=self.micro_batches, micro_batches=self.micro_batches)

    @property
    def one_way(self) -> bool:
        """Whether no gradient comes back: the first member is a device with the data, the last one a server that trains a
        side network from what it sends, the labels first.
        """
        return self.to_below is None and self.from_above is None

    def data(self, fingerprint: str, held_out: str | None) -> tuple[str, str | None]:
        """Fingerprints of the data that are trained and evaluated on. Where messages pass one way, those that the device
        tells.
        """
        if not self.one_way:
            return fingerprint, held_out
        if self.first:
            self.transport.send_json([fingerprint, held_out], 1)
            return fingerprint, held_out
        told, evaluated = self.transport.receive_json(0)
        return told, evaluated

    def labels(self, out: Tensor) -> None:
        """Put the labels of the current micro-batch, which a device has sent, into `out`; waits until they are there."""
        assert self.from_below
        self.from_below.take(self._up, 0, out)

    def ahead_before(self, step: int) -> Iterator[int]:
        """The micro-batches of the run, counted from 1, whose forward is due before `step` is trained; `step` begins a
        step of the fleet where it is the first of its micro-batches.
        """
        if (step - 1) % self.micro_batches == 0:
            self._begin_step()
            yield from range(step, step + self.ahead)

    def ahead_after(self, step: int) -> Iterator[int]:
        """The same for those due after `step` has been trained."""
        if self.ahead and (step - 1) % self.micro_batches + self.ahead < self.micro_batches:
            yield step + self.ahead

    def _begin_step(self) -> None:
        self._losses = []
        self._waited = self.waited
        self._expect(up=self.micro_batches, down=self.micro_batches)

    def _expect(self, *, up: int, down: int) -> None:
        if self.from_below:
            self.from_below.expect(up)
        if self.from_above and down:
            self.from_above.expect(down)

    def begin(self, step: int, kind: Kind) -> None:
        """Begin micro-batch `step` of the run, counted from 1: train it, or take its forward ahead."""
        self._kind = kind
        place = (step - 1) % self.micro_batches
        self._up, self._down = self._base_up + place, self._base_down + place

    def begin_evaluation(self) -> None:
        """Begin a batch of an evaluation."""
        self._kind = "evaluate"
        self._expect(up=1, down=0)
        self._up = self._base_up
        self._base_up += 1

    # --- called by operators ---------------------------------------------------------------------------------------

    def send(self, tensor: Tensor, direction: Direction, number: int) -> None:
        """Send a tensor of the current micro-batch, by its place in the message."""
        outgoing = self.to_above if direction == "up" else self.to_below
        assert outgoing
        if direction == "up" and self._kind == "train" and self.ahead:
            return  # sent when the forward was taken ahead
        outgoing.put(number, tensor)

    def receive(self, out: Tensor, direction: Direction, number: int) -> None:
        """Put a tensor of the current micro-batch, by its place in the message, into `out`; waits until it is there."""
        incoming = self.from_below if direction == "up" else self.from_above
        assert incoming
        message = self._up if direction == "up" else self._down
        incoming.take(message, number, out)
        if number == len(incoming.passing) - 1 and self._kind != "ahead":
            incoming.done(message)

    # --- between micro-batches -------------------------------------------------------------------------------------

    def told(self, loss: float) -> None:
        """Note the loss of a micro-batch; only that of the last member means anything."""
        self._losses.append(loss)

    def finish(self, step: int, *, stop: bool) -> Exchanged:
        """End a step of the fleet, after its last micro-batch: the last member tells the losses, and all whether one of
        them was asked to end.
        """
        import torch

        self._base_up += self.micro_batches
        self._base_down += self.micro_batches
        for outgoing in (self.to_above, self.to_below):
            if outgoing:
                outgoing.drain()
        begun = time.perf_counter()
        # Whether somebody was asked to end, then the losses.
        told = torch.zeros(1 + self.micro_batches, dtype=torch.float64)
        told[0] = float(stop)
        rank = self.transport.rank
        if not self.first:
            self.transport.receive(told, rank - 1, CLOSE).wait()
            told[0] = max(float(told[0]), float(stop))
        if self.last:
            told[1:] = torch.tensor(self._losses, dtype=torch.float64)
        else:
            self.transport.send(told, rank + 1, CLOSE).wait()
            self.transport.receive(told, rank + 1, CLOSE).wait()
        if not self.first:
            self.transport.send(told, rank - 1, CLOSE).wait()
        waited = self.waited - self._waited + time.perf_counter() - begun
        losses = [float(one) for one in told[1:]]
        return Exchanged(losses=losses, labels=0.0, stop=bool(told[0]), exchange_seconds=waited, update_seconds=0.0)

    @property
    def waited(self) -> float:
        """Seconds that this member has waited for messages, and for room to send."""
        sides = (self.from_below, self.to_below, self.to_above, self.from_above)
        return sum(side.waited for side in sides if side)

    def agreed(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result of an evaluation, which the last member tells all others; where messages pass one way, the first one."""
        knows = 0 if self.one_way else len(self.transport.members) - 1
        if self.transport.rank == knows:
            for rank in range(len(self.transport.members)):
                if rank != knows:
                    self.transport.send_json(result, rank)
            return result
        told: dict[str, Any] = self.transport.receive_json(knows)
        return told

    # --- evaluation where messages pass one way --------------------------------------------------------------------

    def count(self, batches: int) -> int:
        """The number of batches of an evaluation, which a device tells the server."""
        if self.first:
            self.transport.send_json(batches, 1)
            return batches
        return int(self.transport.receive_json(0))

    def losses(self, made: Tensor | None, tokens: int) -> Tensor:
        """The losses of a batch's tokens, float32 [tokens], which a server has `made` and sends the device."""
        import torch

        if made is None:
            room = torch.empty(tokens, dtype=torch.float32)
            self.transport.receive(room, 1, CLOSE).wait()
            return room
        self.transport.send(made, 0, CLOSE).wait()
        return made

    # --- the whole of what was trained -----------------------------------------------------------------------------

    def hand_in(self, items: Callable[[], Iterator[TensorItem]]) -> None:
        """Send this member's trained tensors to the first member."""
        self.transport.send_json([[one.name, one.dtype, one.shape] for one in items()], 0)
        import torch

        for item in items():
            for chunk in item.chunks():
                self.transport.send(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), 0).wait()

    def collected(self, chunk: int) -> list[TensorItem]:
        """The trained tensors of all other members, in the order of the layers; each can be read once, in this order,
        in pieces of at most `chunk` bytes.
        """
        result = []
        for rank in range(1, len(self.transport.members)):
            for name, dtype, shape in self.transport.receive_json(rank):
                item = TensorItem(name=name, dtype=dtype, shape=shape, chunks=lambda: ())
                size = item.bytes

                def chunks(rank: int = rank, size: int = size) -> Iterator[memoryview]:
                    import torch

                    for done in range(0, size, chunk):
                        room = bytearray(min(chunk, size - done))
                        self.transport.receive(torch.frombuffer(room, dtype=torch.uint8), rank).wait()
                        yield memoryview(room)

                result.append(TensorItem(name=name, dtype=dtype, shape=shape, chunks=chunks))
        return result

    def close(self) -> None:
        self.transport.close()
