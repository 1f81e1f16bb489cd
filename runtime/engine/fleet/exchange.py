"""The update of a fleet's member: keeps the gradients of its micro-batches, has the fleet add all of them up, updates.

A step of the fleet is `micro_batches` micro-batches in a global order, of which each member computes a run of
neighbouring ones. The members form a chain in that order. Each adds its gradients one after the other to the sum that
comes from the member before it, the last one divides, and the mean goes back down the chain. Every addition is the one
that a single process makes which accumulates the same micro-batches, in the same order, so that the sum is the same to
the bit (`tightfit.runtime.engine.kernels.optimizer.GradientUpdate`). Then every member makes the same update.

A member changes its trained tensors only once it has all of the mean. If one ends before, the others still hold the
state after the latest update.
"""

from __future__ import annotations

import ctypes
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.fleet.pieces import ITEM, Pieces
from tightfit.runtime.engine.fleet.role import Exchanged, JoinedRole, Share
from tightfit.runtime.engine.fleet.shelf import Buffers, DiskShelf, MemoryShelf, Shelf
from tightfit.runtime.engine.fleet.transport import Pending, Transport, bytes_of
from tightfit.runtime.engine.kernels.optimizer import AdamW, GradientUpdate

if TYPE_CHECKING:
    from torch import Tensor

PREFETCH = 2
"""pieces that may be under way to a member before it has taken the first of them"""


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
class Trained:
    """What an exchange updates, and with what."""

    optimizer: AdamW
    shapes: Sequence[Sequence[int]]
    """of the trained tensors, in order"""
    value: Callable[[int], Tensor]
    """the values of a trained tensor, by its number"""
    keep: Callable[[int, Tensor], None]
    """puts the values of a trained tensor back"""
    directory: str
    """for what lies on disk"""
    channel: TransferChannel


class Exchange(JoinedRole):
    """Hands gradients over as they come (`apply`); `finish` adds up those of all members and updates."""

    def __init__(
        self, transport: Transport, part: ExchangePart, trained: Trained, micro_batches: int, *, exact: bool
    ) -> None:
        """Raises RunError where the disk lacks the space for gradients or states."""
        super().__init__(transport, exact=exact)
        self.share = Share(first=part.first, count=part.count, micro_batches=micro_batches)
        self.exchange = self
        self.optimizer = trained.optimizer
        self.pieces = pieces = pieces_of(trained.shapes, part.piece_bytes)
        self._buffers, self._channel = Buffers(pieces.largest, part.buffers), trained.channel
        self._value, self._keep = trained.value, trained.keep
        self._adds_up = transport.rank == 0
        """the first member starts the sum, so that it keeps no gradients apart"""

        def shelf(where: str, rows: int) -> Shelf:
            return MemoryShelf(pieces, rows) if where == "memory" else DiskShelf(pieces, rows, trained.directory)

        self.gradients = shelf(part.gradients, 1 if self._adds_up else part.count)
        self.states = shelf(part.states, 2)
        self._on_disk = part.gradients == "disk"
        self._weights: list[float] = [0.0] * part.count
        self._losses: list[float] = [0.0] * part.count
        self._row = 0
        self._open: dict[int, list[Any]] = {}
        """piece -> [buffer, elements that are still missing]: gradients that wait until their piece is whole"""
        self._checksum: int | None = None
        """crc32 of the trained tensors after the latest update"""
        self._update = GradientUpdate(trained.optimizer, micro_batches)

    # --- while a member computes -----------------------------------------------------------------------------------

    def begin(self, step: int, weight: float) -> None:
        """Begin micro-batch `step` of the run, counted from 1, whose gradients are means over `weight` labels."""
        self._row = (step - 1) % self.share.micro_batches - self.share.first
        self._weights[self._row] = weight

    def told(self, loss: float) -> None:
        self._losses[self._row] = loss

    def apply(self, tensor: int, gradient: Tensor) -> None:
        """Take the gradient of a trained tensor, given by its number."""
        piece, begin, end = self.pieces.slot(tensor)
        values = gradient.view(-1)
        if not self._on_disk:
            own = self.gradients.read(0 if self._adds_up else self._row, piece, values)[begin:end]
            if not self._adds_up:
                own.copy_(values)
            else:
                if self._row == 0:
                    own.zero_()
                own.add_(values, alpha=self._weights[self._row])
            return
        if piece not in self._open:
            self._open[piece] = [self._room(), self.pieces.sizes[piece]]
        entry = self._open[piece]
        entry[0][begin:end].copy_(values)
        entry[1] -= end - begin
        if not entry[1]:
            del self._open[piece]
            self._channel.submit(self._put, self._row, piece, entry[0], self._weights[self._row])

    def _room(self) -> Tensor:
        """A buffer for a piece. The plan's updates follow the backward, so that few pieces are open at once; should all
        buffers be taken by them, the heap gives another.
        """
        buffer = self._buffers.take_at_once()
        if buffer is None:
            self._channel.drain()
            buffer = self._buffers.take_at_once()
        if buffer is None:
            import torch

            buffer = torch.empty(self.pieces.largest)
        return buffer

    def _put(self, row: int, piece: int, buffer: Tensor, weight: float) -> None:
        """Write a piece of a micro-batch's gradients to disk, in the channel's thread."""
        values = buffer[: self.pieces.sizes[piece]]
        if not self._adds_up:
            self.gradients.write(row, piece, values)
        else:
            total = self._buffers.take()
            before = self.gradients.read(0, piece, total) if row else total[: self.pieces.sizes[piece]].zero_()
            self.gradients.write(0, piece, before.add_(values, alpha=weight))
            self._buffers.give_back(total)
        self._buffers.give_back(buffer)

    # --- once it has computed its micro-batches -----------------------------------------------------------------------

    def finish(self, step: int, *, stop: bool) -> Exchanged:
        """Add up the gradients of all members and make update number `step` / `micro_batches`.

        Returns once this member has made it. Raises MemberGoneError where another member has ended, and RunError where
        the members' trained tensors differ; nothing is changed then.
        """
        begun = time.perf_counter()
        self._channel.drain()
        transport, last = self.transport, len(self.transport.members) - 1
        rank = transport.rank
        header: dict[str, Any] = {"step": step, "labels": 0.0, "losses": [], "stop": False, "checksum": self._checksum}
        if rank:
            header = transport.receive_json(rank - 1)
            self._agree(header, step)
        header["labels"] += sum(self._weights)
        header["losses"] += self._losses
        header["stop"] = header["stop"] or stop
        returning = _Returning(self) if rank < last else None
        if returning:
            transport.send_json(header, rank + 1)
            returning.start()
        else:
            transport.send_json(header, rank - 1)
        self._forward(max(1.0, header["labels"]))
        if returning:
            header = returning.result()
        received = time.perf_counter()
        self._make_update(step)
        return Exchanged(
            losses=header["losses"],
            labels=header["labels"],
            stop=header["stop"],
            exchange_seconds=received - begun,
            update_seconds=time.perf_counter() - received,
        )

    def _agree(self, header: dict[str, Any], step: int) -> None:
        first = self.transport.members[0]
        if header["step"] != step:
            raise RunError(
                f"{first!r} is at step {header['step']} and this member at {step}; start the fleet again with"
                f" {spelled('resume', True)}"
            )
        if header["checksum"] != self._checksum:
            raise RunError(
                f"the trained tensors differ between {first!r} and {self.transport.members[self.transport.rank]!r}:"
                " their processors round differently; leave one of the two out of the fleet"
            )

    def _forward(self, labels: float) -> None:
        """Pass the sum on up the chain, piece by piece, with this member's gradients added; the last member sends the
        mean back.
        """
        transport, buffers = self.transport, self._buffers
        rank, last = transport.rank, len(transport.members) - 1
        coming = IncomingPieces(self, rank - 1) if rank else None
        going: deque[tuple[Pending, Tensor]] = deque()
        spare = buffers.take()
        for piece in range(len(self.pieces)):
            buffer = coming.take() if coming else buffers.take()
            total = buffer[: self.pieces.sizes[piece]]
            if coming:
                for row, weight in enumerate(self._weights):
                    total.add_(self.gradients.read(row, piece, spare), alpha=weight)
            else:
                total.copy_(self.gradients.read(0, piece, spare))
            if rank == last:
                self.gradients.write(0, piece, total.div_(labels))
            going.append((transport.send(total, rank + 1 if rank < last else rank - 1), buffer))
            while len(going) > 1:
                self._sent(going.popleft())
        while going:
            self._sent(going.popleft())
        buffers.give_back(spare)

    def _sent(self, message: tuple[Pending, Tensor]) -> None:
        pending, buffer = message
        pending.wait()
        self._buffers.give_back(buffer)

    def _make_update(self, step: int) -> None:
        """AdamW with the mean gradients, piece by piece."""
        number = step // self.share.micro_batches
        self._update.optimizer = self.optimizer
        self._update.begin(step)
        buffers = [self._buffers.take() for _ in range(3)]
        checksum = 0
        for piece in range(len(self.pieces)):
            mean = self.gradients.read(0, piece, buffers[0])
            first, second = (self.states.read(row, piece, buffers[1 + row]) for row in (0, 1))
            for tensor in self.pieces.tensors(piece):
                _, begin, end = self.pieces.slot(tensor)
                values = self._value(tensor)
                shaped = (one[begin:end].view(values.shape) for one in (mean, first, second))
                self._update.make(number, values, *shaped)
                self._keep(tensor, values)
                checksum = _crc32(values, checksum)
            self.states.write(0, piece, first)
            self.states.write(1, piece, second)
        self._checksum = checksum
        for buffer in buffers:
            self._buffers.give_back(buffer)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_chunks(self, row: int, tensor: int) -> Iterator[memoryview]:
        """The bytes of a trained tensor's state: row 0 has Adam's first moments, row 1 the second ones, and any other
        zeros.
        """
        piece, begin, end = self.pieces.slot(tensor)
        buffer = self._buffers.take()
        whole = self.states.read(row, piece, buffer) if row < 2 else buffer.zero_()
        copied = whole[begin:end].clone()
        self._buffers.give_back(buffer)
        yield bytes_of(copied)

    def set_state(self, row: int, tensor: int, values: Tensor) -> None:
        """Put a trained tensor's state in its place; zeros have none."""
        if row >= 2:
            return
        piece, begin, end = self.pieces.slot(tensor)
        buffer = self._buffers.take()
        whole = self.states.read(row, piece, buffer)
        whole[begin:end].copy_(values.view(-1))
        self.states.write(row, piece, whole)
        self._buffers.give_back(buffer)

    def close(self) -> None:
        super().close()
        self.gradients.close()
        self.states.close()


class IncomingPieces:
    """The pieces that come from a peer, in order, `PREFETCH` of them under way at a time."""

    def __init__(self, exchange: Exchange, peer: int) -> None:
        self._exchange, self._peer = exchange, peer
        self._asked = 0
        self._coming: deque[tuple[Pending, Tensor]] = deque()
        for _ in range(PREFETCH):
            self._ask()

    def take(self) -> Tensor:
        """The buffer with the next piece, in order; waits for it."""
        pending, buffer = self._coming.popleft()
        pending.wait()
        self._ask()
        return buffer

    def _ask(self) -> None:
        pieces = self._exchange.pieces
        if self._asked < len(pieces):
            buffer = self._exchange._buffers.take()
            into = buffer[: pieces.sizes[self._asked]]
            self._coming.append((self._exchange.transport.receive(into, self._peer), buffer))
            self._asked += 1


class _Returning(Thread):
    """Takes the mean from the member above, keeps it, and passes it on to the member below."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(name="tightfit-mean", daemon=True)
        self._exchange = exchange
        self._header: dict[str, Any] = {}
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._pass_on()
        except BaseException as error:  # raised again in `result`
            self._error = error

    def result(self) -> dict[str, Any]:
        """Wait until all is received and passed on; returns what the last member told about the step."""
        self.join()
        if self._error:
            raise self._error
        return self._header

    def _pass_on(self) -> None:
        exchange, transport = self._exchange, self._exchange.transport
        rank = transport.rank
        self._header = transport.receive_json(rank + 1)
        if rank:
            transport.send_json(self._header, rank - 1)
        coming = IncomingPieces(exchange, rank + 1)
        for piece in range(len(exchange.pieces)):
            buffer = coming.take()
            mean = buffer[: exchange.pieces.sizes[piece]]
            exchange.gradients.write(0, piece, mean)
            if rank:
                transport.send(mean, rank - 1).wait()
            exchange._buffers.give_back(buffer)


def pieces_of(shapes: Sequence[Sequence[int]], limit: int) -> Pieces:
    """The pieces of trained tensors of these shapes."""
    return Pieces([math.prod(shape) for shape in shapes], limit)


def _crc32(values: Tensor, checksum: int) -> int:
    size = values.numel() * ITEM
    return zlib.crc32((ctypes.c_char * size).from_address(values.data_ptr()), checksum)
