"""Plays one step of a pipeline on a clock: stages train micro-batches, activations pass up the chain and gradients down.

What it assumes is what the runtime does (`tightfit.runtime.engine.fleet.stage`):

- A stage runs its schedules one after the other. One of them waits where it receives, until the message has arrived, and
  where it sends, until the message before the previous one has left its buffer; all that follows comes as much later.
- A stage in turns (`ahead` 0), and the last one, trains one micro-batch after the other. A stage ahead by d runs the
  forward alone of d micro-batches first, and of the next one after each that it has trained; its training schedules then
  send nothing up.
- No stage is ahead by more than the stage below, or by one (`agree`): it would wait for ever.
- Activations are received into a ring of `ahead` + 1 messages, `ahead` being that of the stage below, and stay there until
  the training schedule has taken them; gradients into two buffers. Links are those of the clock (`clock`).
- Once all are done, the members tell one another along the chain and back that they are.

Where messages pass one way only (mobillm), their labels come first: the device begins a forward once there is a buffer to send
from, and the server a micro-batch once its message is there, whose place is free again when the micro-batch has been trained.
(The runtime waits a little later for either, so that a step takes no longer than is said here.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tightfit.planner.fleet.clock import Played, Step, Stream, Thread
from tightfit.planner.fleet.parts import RINGS
from tightfit.planner.fleet.pipeline_marks import Marks
from tightfit.planner.fleet.schema import Link
from tightfit.runtime.engine.fleet.message import RECEIVING_DOWN, SENDING, ring


@dataclass(frozen=True, kw_only=True)
class Station:
    """A stage as it stands in the chain."""

    train: Marks
    forward: Marks
    """of the forward alone"""
    ahead: int
    link: Link
    up_bytes: int = 0
    """of a message to the stage above"""
    down_bytes: int = 0
    """of a message to the stage below"""


def play(stations: Sequence[Station], micro_batches: int) -> Played:
    """One step of the stages, in the order of the chain."""
    return _Pipeline(stations, micro_batches).run()


@dataclass(frozen=True, kw_only=True)
class OneWay:
    """A device and a server, to which messages pass, by the seconds that each takes for a micro-batch."""

    device_seconds: float
    server_seconds: float
    message_bytes: int
    device_link: Link
    server_link: Link

    def play(self, micro_batches: int) -> Played:
        """One step of the two."""
        return _OneWay(self, micro_batches).run()

    def least_seconds(self, micro_batches: int) -> float:
        """No order of the same parts takes less: all micro-batches on the slowest part, the first one's way there and the
        last one's from there, and the word that the step is done, there and back.
        """
        link = self.message_bytes / min(self.device_link.up_bytes_per_second, self.server_link.down_bytes_per_second)
        latency = self.device_link.latency_seconds + self.server_link.latency_seconds
        parts = self.device_seconds, link, self.server_seconds
        return sum(parts) + latency + (micro_batches - 1) * max(parts) + 2 * latency


def closing_seconds(links: Sequence[Link]) -> float:
    """Seconds in which members in the order of a chain tell one another that they are done, there and back."""
    return 2 * sum(one.latency_seconds + other.latency_seconds for one, other in pairwise(links))


def turns(ahead: int, micro_batches: int) -> Iterator[tuple[Literal["forward", "train"], int]]:
    """The schedules that a stage runs in a step, with the micro-batch of each."""
    for number in range(min(ahead, micro_batches)):
        yield "forward", number
    for number in range(micro_batches):
        yield "train", number
        if ahead and number + ahead < micro_batches:
            yield "forward", number + ahead


def agree(aheads: Sequence[int]) -> bool:
    """Whether stages that are so far ahead get what they wait for: one that is ahead by d takes d activations before the
    stage below gets a gradient, which sends as many as it is ahead itself, or one in turns.
    """
    return all(other <= max(1, one) for one, other in pairwise(aheads))


class _Pipeline(Step):
    def __init__(self, stations: Sequence[Station], micro_batches: int) -> None:
        super().__init__([station.link for station in stations])
        self.stations, self.micro_batches = stations, micro_batches
        self._up = [
            Stream(source=at, target=at + 1, sizes=[one.up_bytes] * micro_batches)
            for at, one in enumerate(stations[:-1])
        ]
        """by source"""
        self._down = [
            Stream(source=at + 1, target=at, sizes=[one.down_bytes] * micro_batches)
            for at, one in enumerate(stations[1:])
        ]
        """by target"""
        self._left = len(stations)

    def run(self) -> Played:
        for at in range(len(self.stations)):
            self.clock.start(self._stage(at), 0.0)
        for at, (up, down) in enumerate(zip(self._up, self._down)):
            self.links.open(up, slice(ring(self.stations[at].ahead)))
            self.links.open(down, slice(RECEIVING_DOWN))
        self.clock.run()
        assert not self._left
        done = max(one.end for one in self.doings)
        return Played(makespan=done + closing_seconds([one.link for one in self.stations]), doings=self.doings)

    def _stage(self, at: int) -> Thread:
        station = self.stations[at]
        for schedule, number in turns(station.ahead, self.micro_batches):
            yield from self._train(at, number) if schedule == "train" else self._forward(at, number)
        self._left -= 1

    def _forward(self, at: int, number: int) -> Thread:
        """The forward alone of a micro-batch, which sends activations up."""
        station, clock = self.stations[at], self.clock
        marks, begun = station.forward, clock.now
        if at:
            yield clock.now + marks.receive_up
            yield self._up[at - 1].arrived[number]
        yield clock.now + marks.send_up - (marks.receive_up if at else 0.0)
        yield from self._post(self._up[at], number)
        yield clock.now + marks.seconds - marks.send_up
        self.does("forward", at, begun, number=number)

    def _train(self, at: int, number: int) -> Thread:
        station, clock = self.stations[at], self.clock
        marks, begun, done = station.train, clock.now, 0.0
        first, last = not at, at == len(self.stations) - 1
        if not first:
            source = self._up[at - 1]
            yield clock.now + marks.receive_up
            yield source.arrived[number]
            following = number + ring(self.stations[at - 1].ahead)
            self.links.open(source, slice(following, following + 1))
            done = marks.receive_up
        if not last:
            yield clock.now + marks.send_up - done
            if not station.ahead:
                yield from self._post(self._up[at], number)
            yield clock.now + marks.receive_down - marks.send_up
            done = marks.receive_down
            self.does("again" if station.ahead else "forward", at, begun, number=number)
            yield self._down[at].arrived[number]
            self.links.open(self._down[at], slice(number + RECEIVING_DOWN, number + RECEIVING_DOWN + 1))
        else:
            yield clock.now + marks.middle - done
            done = marks.middle
            self.does("forward", at, begun, number=number)
        begun = clock.now
        if not first:
            yield clock.now + marks.send_down - done
            yield from self._post(self._down[at - 1], number)
            done = marks.send_down
        yield clock.now + marks.seconds - done
        self.does("backward", at, begun, number=number)

    def _post(self, stream: Stream, number: int) -> Thread:
        """Send a message once there is a buffer for it."""
        if number >= SENDING:
            yield stream.sent[number - SENDING]
        self.links.send(stream, number)


class _OneWay(Step):
    def __init__(self, parts: OneWay, micro_batches: int) -> None:
        self.both = [parts.device_link, parts.server_link]
        super().__init__(self.both)
        self.parts = parts
        self.messages = Stream(source=0, target=1, sizes=[parts.message_bytes] * micro_batches)

    def run(self) -> Played:
        self.clock.start(self._device(), 0.0)
        self.clock.start(self._server(), 0.0)
        self.links.open(self.messages, slice(RINGS))
        self.clock.run()
        return Played(makespan=self.clock.now + closing_seconds(self.both), doings=self.doings)

    def _device(self) -> Thread:
        for number in range(len(self.messages.sizes)):
            if number >= SENDING:
                yield self.messages.sent[number - SENDING]
            begun = self.clock.now
            yield begun + self.parts.device_seconds
            self.does("forward", 0, begun, number=number)
            self.links.send(self.messages, number)

    def _server(self) -> Thread:
        for number in range(len(self.messages.sizes)):
            yield self.messages.arrived[number]
            begun = self.clock.now
            yield begun + self.parts.server_seconds
            self.does("compute", 1, begun, number=number)
            self.links.open(self.messages, slice(number + RINGS, number + RINGS + 1))
