"""Reads the streamed pieces of matrices ahead of their use, in the order in which every pass needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.device import Device, Mark
from tightfit.runtime.engine.generation.job import DEPTH, Piece
from tightfit.runtime.engine.weights.store import WeightStore


class StreamedPieces(Protocol):
    """What gives a decoder the pieces that are not in its arena: `begin` is called before a pass, then `take` and
    `release` for each of the pass's pieces in order.
    """

    def begin(self, *, with_head: bool) -> None: ...

    def take(self) -> Tensor: ...

    def release(self) -> None: ...


class PieceStream:
    """Rooms for `DEPTH` pieces in the arena, filled in turn by the channel's thread.

    `body` are the pieces that every pass needs and `head` those that only the last pass of a prompt needs after them.
    Call `begin` before a pass, then `take` and `release` for each of its pieces in order. Reads go on into the next
    pass's body, which comes next in any case.
    """

    def __init__(
        self,
        channel: TransferChannel,
        device: Device,
        store: WeightStore,
        staging: tuple[int, int],
        body: Sequence[Piece],
        head: Sequence[Piece],
    ) -> None:
        self._channel, self._device, self._store = channel, device, store
        self._at, self._size = staging
        self._body, self._head = tuple(body), tuple(head)
        self._order: tuple[Piece, ...] = ()
        """of this pass"""
        self._asked = 0
        """pieces of this pass that were asked for"""
        self._ahead = 0
        """pieces of the next pass's body that were asked for"""
        self._issued = self._taken = self._released = 0
        """since the start"""
        self._tickets: dict[int, int] = {}
        self._landed: dict[int, Mark] = {}
        """marks of the copies to the device, which the channel's thread asks for"""

    def begin(self, *, with_head: bool) -> None:
        """Start a pass."""
        self._order = self._body + (self._head if with_head else ())
        self._asked, self._ahead = self._ahead, 0
        self._fill()

    def take(self) -> Tensor:
        """The bytes of the next piece, as `WeightStore.read_into` leaves them; waits until they are there."""
        number = self._taken
        self._channel.wait(self._tickets.pop(number))
        self._device.follow(self._landed.pop(number))
        self._taken += 1
        return self._device.raw(self._room(number), self._size)

    def release(self) -> None:
        """The piece that was taken is not needed any more."""
        self._released += 1
        self._fill()

    def _fill(self) -> None:
        while self._issued - self._released < DEPTH:
            if self._asked < len(self._order):
                piece = self._order[self._asked]
                self._asked += 1
            elif self._ahead < len(self._body):
                piece = self._body[self._ahead]
                self._ahead += 1
            else:
                return
            at = self._room(self._issued)
            after = self._device.mark()  # of operators that may still read the piece that this overwrites
            host = self._device.host(at, (self._store.packed_bytes(piece.name),), "uint8")
            self._tickets[self._issued] = self._channel.submit(self._read, self._issued, piece.name, at, host, after)
            self._issued += 1

    def _room(self, number: int) -> int:
        return self._at + number % DEPTH * self._size

    def _read(self, number: int, name: str, at: int, host: Tensor, after: Mark) -> None:
        self._store.read_into(name, host)
        self._landed[number] = self._device.put(at, host, after)
