"""Plays one step of a fleet on a clock: members compute, gradients pass down the chain and means back up, all update.

What it assumes is what the runtime does (`tightfit.runtime.engine.fleet.exchange`):

- A member computes its micro-batches one after the other. Then headers of a few bytes pass down the chain and back, in
  two messages each. A member takes a header once it has computed, and waits until the next one has taken it.
- Then a thread passes the sums on, piece by piece: it takes a piece, adds the member's gradients, reading them from the
  shelf one after the other, and sends it. The last member divides, stores the mean on its shelf, and sends that back. A
  second thread of the others takes the means, stores them and passes them on.
- A thread may send a piece before the one before has left, and then waits for that. Two pieces may be under way to a
  thread before it must have taken the first, and none before it has begun.
- Pieces pass over links as messages of the clock (`clock`).
- A disk serves requests in their order, each with its latency.
- A member that has all means, and has passed all pieces on, makes the update: it reads means and states, computes, and
  writes the states back, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.planner.fleet.clock import Played, Signal, Step, Stream, Thread
from tightfit.planner.fleet.member_profiles import COPY_BYTES_PER_SECOND
from tightfit.planner.fleet.schema import Link, Shelf
from tightfit.profiles.schema import Channel

UNDER_WAY = 2
"""pieces that may be under way to a thread before it must have taken the first"""
HEADER = 2
"""messages of a header"""
CHECKED_BYTES_PER_SECOND = 1e9
"""of the checksum over the trained tensors that follows an update, at least, on the devices that have been measured"""


@dataclass(frozen=True, kw_only=True)
class Station:
    """A member as it stands in the chain."""

    computed_seconds: float
    """when it has computed all its micro-batches"""
    link: Link
    slots: int
    """rows of gradients on its shelf"""
    gradients: Shelf
    states: Shelf
    update_seconds: float
    """of the optimizer's arithmetic"""
    read: Channel
    write: Channel


@dataclass(frozen=True, kw_only=True)
class Exchanged(Played):
    """One step, and when each station was done."""

    exchanged: list[float]
    """it had all means and had passed all pieces on"""
    updated: list[float]


def play(stations: Sequence[Station], pieces: Sequence[int]) -> Exchanged:
    """One step of two stations or more, in the order of the chain, with pieces of so many bytes."""
    return _Exchange(stations, pieces).run()


def transfer_seconds(channel: Channel, size: float, requests: int = 1) -> float:
    """Seconds that a disk takes for `size` bytes in so many requests."""
    return requests * channel.latency_seconds + size / channel.bytes_per_second


def copy_seconds(size: float) -> float:
    """Seconds of the cores to add gradients of so many bytes to others, or to copy them."""
    return size / COPY_BYTES_PER_SECOND


def whole_update_seconds(station: Station, pieces: Sequence[int]) -> float:
    """Seconds of a station's update, with what it reads from its shelves and writes back."""
    total, count = sum(pieces), len(pieces)
    seconds = station.update_seconds + total / CHECKED_BYTES_PER_SECOND
    if station.gradients == "disk":
        seconds += transfer_seconds(station.read, total, count)
    if station.states == "disk":
        seconds += 2 * (transfer_seconds(station.read, total, count) + transfer_seconds(station.write, total, count))
    return seconds


class _Exchange(Step):
    def __init__(self, stations: Sequence[Station], pieces: Sequence[int]) -> None:
        super().__init__([station.link for station in stations])
        self.stations, self.pieces = stations, pieces
        count = len(stations)
        self._disk = [0.0] * count
        """when each disk has served all that it was asked for"""
        self._computed = [Signal() for _ in stations]
        self._told = [Signal() for _ in stations]
        """a header has arrived from the member before"""
        self._told_back = [Signal() for _ in stations]
        """a header has arrived from the member after"""
        self._sums = [self._stream(at, at + 1) for at in range(count - 1)]
        """by source"""
        self._means = [self._stream(at + 1, at) for at in range(count - 1)]
        """by target"""
        self._threads_left = [1 if at == count - 1 else 2 for at in range(count)]
        self._exchanged, self._updated = [0.0] * count, [0.0] * count

    def run(self) -> Exchanged:
        for at, station in enumerate(self.stations):
            self.clock.start(self._pass_sums(at), station.computed_seconds)
            if at < len(self.stations) - 1:
                self.clock.start(self._pass_means(at), station.computed_seconds)
        self.clock.run()
        assert not any(self._threads_left)
        return Exchanged(
            makespan=max(self._updated), doings=self.doings, exchanged=self._exchanged, updated=self._updated
        )

    # --- threads ---------------------------------------------------------------------------------------------------

    def _pass_sums(self, at: int) -> Thread:
        station = self.stations[at]
        source = self._sums[at - 1] if at else None
        last = at == len(self.stations) - 1
        onward = self._means[at - 1] if last else self._sums[at]
        self.clock.give(self._computed[at])
        if at:
            yield self._told[at]
        if last:
            yield self.clock.now + HEADER * self.links.latency(at, at - 1)
            self.clock.give(self._told_back[at - 1])
        else:
            yield self._computed[at + 1]
            yield self.clock.now + HEADER * self.links.latency(at, at + 1)
            self.clock.give(self._told[at + 1])
        self._open(source)
        for piece, size in enumerate(self.pieces):
            if source is not None:
                yield from self._take(source, piece)
            begun = self.clock.now
            if station.gradients == "disk":
                yield self._on_disk(at, transfer_seconds(station.read, station.slots * size, station.slots))
            yield self.clock.now + copy_seconds(station.slots * size)
            self.does("add", at, begun)
            if last:
                yield self._stored(at, size)
            self.links.send(onward, piece)
            if piece:
                yield onward.sent[piece - 1]
        yield onward.sent[-1]
        self._thread_ends(at)

    def _pass_means(self, at: int) -> Thread:
        source = self._means[at]
        onward = self._means[at - 1] if at else None
        yield self._told_back[at]
        if at:
            yield self.clock.now + HEADER * self.links.latency(at, at - 1)
            self.clock.give(self._told_back[at - 1])
        self._open(source)
        for piece, size in enumerate(self.pieces):
            yield from self._take(source, piece)
            yield self._stored(at, size)
            if onward is not None:
                self.links.send(onward, piece)
                yield onward.sent[piece]
        self._thread_ends(at)

    def _stored(self, at: int, size: int) -> float:
        """When a mean that is stored now lies on the shelf."""
        station = self.stations[at]
        if station.gradients == "memory":
            return self.clock.now + copy_seconds(size)
        return self._on_disk(at, transfer_seconds(station.write, size))

    def _take(self, source: Stream, piece: int) -> Thread:
        yield source.arrived[piece]
        if piece + UNDER_WAY < len(self.pieces):
            self.links.open(source, slice(piece + UNDER_WAY, piece + UNDER_WAY + 1))

    def _open(self, source: Stream | None) -> None:
        if source is not None:
            self.links.open(source, slice(UNDER_WAY))

    def _thread_ends(self, at: int) -> None:
        self._threads_left[at] -= 1
        if self._threads_left[at]:
            return
        self._exchanged[at] = self.clock.now
        self._updated[at] = self.clock.now + whole_update_seconds(self.stations[at], self.pieces)
        self.does("update", at, self.clock.now, self._updated[at])

    # --- links and disks -------------------------------------------------------------------------------------------

    def _stream(self, source: int, target: int) -> Stream:
        return Stream(source=source, target=target, sizes=self.pieces)

    def _on_disk(self, at: int, seconds: float) -> float:
        """When a request that is made now is done."""
        self._disk[at] = max(self._disk[at], self.clock.now) + seconds
        return self._disk[at]
