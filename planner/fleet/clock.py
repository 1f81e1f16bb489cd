"""A clock for several devices, and what it plays: the steps of a chain of parts, and the sum of a step's gradients.

**The clock.** Threads sleep and wait for signals. A message from i to j takes latency_i + latency_j + bytes / min(up_i,
down_j). It occupies i's uplink for bytes / up_i, and j's downlink for bytes / down_j. Either serves one message at a
time: of those that could start, the one that was sent first. A message starts once its target can receive it. Messages
pass between neighbours of a chain alone, `up` towards its end and `down` back. What is assumed of threads is what the
runtime does.

**A chain of stages** (`play`, of `tightfit.runtime.engine.fleet.stage`): stages train micro-batches, activations pass
up the chain and gradients down.

- A stage runs its schedules one after the other. One of them waits where it receives, until the message has arrived,
  and where it sends, until the message before the previous one has left its buffer; all that follows comes as much
  later.
- A stage in turns (`ahead` 0), and the last one, trains one micro-batch after the other. A stage ahead by d runs the
  forward alone of d micro-batches first, and of the next one after each that it has trained; its training schedules
  then send nothing up.
- No stage is ahead by more than the stage below, or by one (`agree`): it would wait for ever.
- Activations are received into a ring of `ahead` + 1 messages, `ahead` being that of the stage below, and stay there
  until the training schedule has taken them; gradients into two buffers.
- Once all are done, the members tell one another along the chain and back that they are.

**One way** (`OneWay`, mobillm): labels come first in a message, so that the device begins a forward once there is a
buffer to send from, and the server a micro-batch once its message is there, whose place is free again when the
micro-batch has been trained. (The runtime waits a little later for either, so that a step takes no longer than is said
here.)

**The sum** (`play_sum`, of `tightfit.runtime.engine.fleet.exchange`): gradients pass up the chain in pieces and are
added, means pass back down, all update.

- A member computes its micro-batches one after the other. Then headers of a few bytes pass up the chain and back, in
  two messages each. A member takes a header once it has computed, and waits until the next one has taken it.
- Then a thread passes the sums on, piece by piece: it takes a piece, adds the member's gradients, reading them from the
  shelf one after the other, and sends it. The last member divides, stores the mean on its shelf, and sends that back. A
  second thread of the others takes the means, stores them and passes them on.
- A thread may send a piece before the one before has left, and then waits for that. Two pieces may be under way to a
  thread before it must have taken the first, and none before it has begun.
- A disk serves requests in their order, each with its latency.
- A member that has all means, and has passed all pieces on, makes the update: it reads means and states, computes, and
  writes the states back, one after the other.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

from tightfit.planner.fleet.parts import RINGS
from tightfit.planner.fleet.schema import Link, Shelf
from tightfit.profiles.schema import Channel
from tightfit.runtime.engine.fleet.message import RECEIVING_DOWN, SENDING, ring

COPY_BYTES_PER_SECOND = 5e9
"""of a gradient that is copied, or added to another, on the slowest of the devices that have been measured"""
CHECKED_BYTES_PER_SECOND = 1e9
"""of the checksum over the trained tensors that follows an update, at least, on the devices that have been measured"""
UNDER_WAY = 2
"""pieces of a sum that may be under way to a thread before it must have taken the first"""
HEADER = 2
"""messages of a header"""
Does = Literal["compute", "send", "forward", "again", "backward"]
"""what a device, or a link, does; in a pipeline: forward, again (the forward that is repeated for the backward),
backward
"""


class Signal:
    """Something that happens once, and the threads that wait for it."""

    __slots__ = ("given", "waiting")

    def __init__(self) -> None:
        self.given = False
        self.waiting: list[Thread] = []


Thread = Iterator["float | Signal"]
"""a thread hands over the moment until which it sleeps, or the signal for which it waits"""


class Clock:
    """Moments in seconds, and what happens at them; of what happens at one moment, what was asked for first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def at(self, moment: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), event))

    def start(self, thread: Thread, moment: float) -> None:
        self.at(moment, partial(self._go_on, thread))

    def give(self, signal: Signal) -> None:
        signal.given = True
        for thread in signal.waiting:
            self.start(thread, self.now)
        signal.waiting.clear()

    def _go_on(self, thread: Thread) -> None:
        for wanted in thread:
            if isinstance(wanted, Signal):
                if not wanted.given:
                    wanted.waiting.append(thread)
                    return
            elif wanted > self.now:
                self.start(thread, wanted)
                return


@dataclass(kw_only=True)
class MessageQueue:
    """The messages that pass from one device to another, in their order."""

    source: int
    target: int
    sizes: Sequence[int]
    """bytes of each"""
    room: list[bool] = field(init=False)
    """by message: whether its target can receive it"""
    sent: list[Signal] = field(init=False)
    """by message: it has left its source"""
    arrived: list[Signal] = field(init=False)

    def __post_init__(self) -> None:
        self.room = [False] * len(self.sizes)
        self.sent, self.arrived = ([Signal() for _ in self.sizes] for _ in range(2))


class LinkClock:
    """The uplinks and downlinks of devices, on a clock."""

    def __init__(
        self, clock: Clock, links: Sequence[Link], sends: Callable[[MessageQueue, int, float, float], object]
    ) -> None:
        """`sends` is called with each message as it starts: its queue and number, when it starts and has left."""
        self._clock, self._links, self._sends = clock, links, sends
        self._up, self._down = [0.0] * len(links), [0.0] * len(links)
        """when each uplink and downlink is free"""
        self._waiting: list[tuple[MessageQueue, int]] = []
        """messages, in the order in which they were sent"""

    def send(self, queue: MessageQueue, number: int) -> None:
        self._waiting.append((queue, number))
        self._serve()

    def open(self, queue: MessageQueue, numbers: slice) -> None:
        """The target can receive these messages."""
        queue.room[numbers] = [True] * len(queue.room[numbers])
        self._serve()

    def latency(self, source: int, target: int) -> float:
        return self._links[source].latency_seconds + self._links[target].latency_seconds

    def _serve(self) -> None:
        """Start every message whose links are free and whose target can receive it."""
        clock, waiting = self._clock, []
        for queue, number in self._waiting:
            source, target = queue.source, queue.target
            if not queue.room[number] or max(self._up[source], self._down[target]) > clock.now:
                waiting.append((queue, number))
                continue
            size = queue.sizes[number]
            up = size / self._links[source].up_bytes_per_second
            down = size / self._links[target].down_bytes_per_second
            self._up[source], self._down[target] = clock.now + up, clock.now + down
            left = clock.now + max(up, down)
            clock.at(clock.now + min(up, down), self._serve)
            clock.at(left, partial(clock.give, queue.sent[number]))
            clock.at(left, self._serve)
            clock.at(left + self.latency(source, target), partial(clock.give, queue.arrived[number]))
            self._sends(queue, number, clock.now, left)
        self._waiting = waiting


@dataclass(frozen=True, kw_only=True)
class Doing:
    """What a device, or the link from one to another, does from `begin` to `end`."""

    what: Does
    station: int
    to: int | None = None
    number: int
    """of the micro-batch, or of the piece"""
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Played:
    """One step, in seconds from its beginning."""

    makespan: float
    doings: list[Doing]


class ChainClock:
    """What neighbouring devices do in a step, on a clock of its own with their links; a subclass says what threads they
    run.
    """

    def __init__(self, links: Sequence[Link], up: Sequence[Sequence[int]], down: Sequence[Sequence[int]]) -> None:
        """`up` and `down`: bytes of the messages from one device to the next, and from there back."""
        self.clock = Clock()
        self.links = LinkClock(self.clock, links, self._sends)
        self.up = [MessageQueue(source=at, target=at + 1, sizes=sizes) for at, sizes in enumerate(up)]
        """by source"""
        self.down = [MessageQueue(source=at + 1, target=at, sizes=sizes) for at, sizes in enumerate(down)]
        """by target"""
        self.doings: list[Doing] = []

    def does(self, what: Does, station: int, begun: float, number: int) -> None:
        """A device has done something for a micro-batch since `begun`, until now."""
        end = self.clock.now
        self.doings.append(Doing(what=what, station=station, number=number, begin=begun, end=end))

    def buffer(self, queue: MessageQueue, number: int) -> Thread:
        """Wait until there is a buffer for a message."""
        if number >= SENDING:
            yield queue.sent[number - SENDING]

    def _sends(self, queue: MessageQueue, number: int, begin: float, end: float) -> None:
        one = Doing(what="send", station=queue.source, to=queue.target, number=number, begin=begin, end=end)
        self.doings.append(one)


def closing_seconds(links: Sequence[Link]) -> float:
    """Seconds in which members in the order of a chain tell one another that they are done, there and back."""
    return 2 * sum(one.latency_seconds + other.latency_seconds for one, other in pairwise(links))


# --- a chain of stages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Seconds from the beginning of a schedule that never waits for a message; 0 for a message that it has none of."""

    receive_up: float = 0.0
    """it asks for activations"""
    send_up: float = 0.0
    """it has handed activations over"""
    receive_down: float = 0.0
    """it asks for gradients"""
    send_down: float = 0.0
    """it has handed gradients over"""
    middle: float = 0.0
    """its first backward operator begins; where there is none, as `seconds`"""
    seconds: float
    """it ends"""


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
    return _StageClock(stations, micro_batches).run()


def turns(ahead: int, micro_batches: int) -> Iterator[tuple[Literal["forward", "train"], int]]:
    """The schedules that a stage runs in a step, with the micro-batch of each."""
    for number in range(min(ahead, micro_batches)):
        yield "forward", number
    for number in range(micro_batches):
        yield "train", number
        if ahead and number + ahead < micro_batches:
            yield "forward", number + ahead


def agree(aheads: Sequence[int]) -> bool:
    """Whether stages that are so far ahead get what they wait for: one that is ahead by d takes d activations before
    the stage below gets a gradient, which sends as many as it is ahead itself, or one in turns.
    """
    return all(other <= max(1, one) for one, other in pairwise(aheads))


class _StageClock(ChainClock):
    def __init__(self, stations: Sequence[Station], micro_batches: int) -> None:
        super().__init__(
            [station.link for station in stations],
            [[one.up_bytes] * micro_batches for one in stations[:-1]],
            [[one.down_bytes] * micro_batches for one in stations[1:]],
        )
        self.stations, self.micro_batches = stations, micro_batches
        self._left = len(stations)

    def run(self) -> Played:
        for at in range(len(self.stations)):
            self.clock.start(self._stage(at), 0.0)
        for at, (up, down) in enumerate(zip(self.up, self.down)):
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
            yield self.up[at - 1].arrived[number]
        yield clock.now + marks.send_up - (marks.receive_up if at else 0.0)
        yield from self.buffer(self.up[at], number)
        self.links.send(self.up[at], number)
        yield clock.now + marks.seconds - marks.send_up
        self.does("forward", at, begun, number)

    def _train(self, at: int, number: int) -> Thread:
        station, clock = self.stations[at], self.clock
        marks, begun, done = station.train, clock.now, 0.0
        first, last = not at, at == len(self.stations) - 1
        if not first:
            source = self.up[at - 1]
            yield clock.now + marks.receive_up
            yield source.arrived[number]
            following = number + ring(self.stations[at - 1].ahead)
            self.links.open(source, slice(following, following + 1))
            done = marks.receive_up
        if not last:
            yield clock.now + marks.send_up - done
            if not station.ahead:
                yield from self.buffer(self.up[at], number)
                self.links.send(self.up[at], number)
            yield clock.now + marks.receive_down - marks.send_up
            done = marks.receive_down
            self.does("again" if station.ahead else "forward", at, begun, number)
            yield self.down[at].arrived[number]
            self.links.open(self.down[at], slice(number + RECEIVING_DOWN, number + RECEIVING_DOWN + 1))
        else:
            yield clock.now + marks.middle - done
            done = marks.middle
            self.does("forward", at, begun, number)
        begun = clock.now
        if not first:
            yield clock.now + marks.send_down - done
            yield from self.buffer(self.down[at - 1], number)
            self.links.send(self.down[at - 1], number)
            done = marks.send_down
        yield clock.now + marks.seconds - done
        self.does("backward", at, begun, number)


# --- one way ----------------------------------------------------------------------------------------------------------


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
        """No order of the same parts takes less: all micro-batches on the slowest part, the first one's way there and
        the last one's from there, and the word that the step is done, there and back.
        """
        link = self.message_bytes / min(self.device_link.up_bytes_per_second, self.server_link.down_bytes_per_second)
        latency = self.device_link.latency_seconds + self.server_link.latency_seconds
        parts = self.device_seconds, link, self.server_seconds
        return sum(parts) + latency + (micro_batches - 1) * max(parts) + 2 * latency


class _OneWay(ChainClock):
    def __init__(self, parts: OneWay, micro_batches: int) -> None:
        self.both = [parts.device_link, parts.server_link]
        super().__init__(self.both, [[parts.message_bytes] * micro_batches], [[]])
        self.parts = parts
        (self.messages,) = self.up

    def run(self) -> Played:
        self.clock.start(self._device(), 0.0)
        self.clock.start(self._server(), 0.0)
        self.links.open(self.messages, slice(RINGS))
        self.clock.run()
        return Played(makespan=self.clock.now + closing_seconds(self.both), doings=self.doings)

    def _device(self) -> Thread:
        for number in range(len(self.messages.sizes)):
            yield from self.buffer(self.messages, number)
            begun = self.clock.now
            yield begun + self.parts.device_seconds
            self.does("forward", 0, begun, number)
            self.links.send(self.messages, number)

    def _server(self) -> Thread:
        for number in range(len(self.messages.sizes)):
            yield self.messages.arrived[number]
            begun = self.clock.now
            yield begun + self.parts.server_seconds
            self.does("compute", 1, begun, number)
            self.links.open(self.messages, slice(number + RINGS, number + RINGS + 1))


# --- the sum ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SumStation:
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
class Summed(Played):
    """One step, and when each station was done."""

    exchanged: list[float]
    """it had all means and had passed all pieces on"""
    updated: list[float]


def play_sum(stations: Sequence[SumStation], pieces: Sequence[int]) -> Summed:
    """One step of two stations or more, in the order of the chain, with pieces of so many bytes."""
    return _Sum(stations, pieces).run()


def disk_seconds(channel: Channel, size: float, requests: int = 1) -> float:
    """Seconds that a disk takes for `size` bytes in so many requests."""
    return requests * channel.latency_seconds + size / channel.bytes_per_second


def copy_seconds(size: float) -> float:
    """Seconds of the cores to add gradients of so many bytes to others, or to copy them."""
    return size / COPY_BYTES_PER_SECOND


def whole_update_seconds(station: SumStation, pieces: Sequence[int]) -> float:
    """Seconds of a station's update, with what it reads from its shelves and writes back."""
    total, count = sum(pieces), len(pieces)
    seconds = station.update_seconds + total / CHECKED_BYTES_PER_SECOND
    if station.gradients == "disk":
        seconds += disk_seconds(station.read, total, count)
    if station.states == "disk":
        seconds += 2 * (disk_seconds(station.read, total, count) + disk_seconds(station.write, total, count))
    return seconds


class _Sum(ChainClock):
    def __init__(self, stations: Sequence[SumStation], pieces: Sequence[int]) -> None:
        sizes = [pieces] * (len(stations) - 1)
        super().__init__([station.link for station in stations], sizes, sizes)
        self.stations, self.pieces = stations, pieces
        count = len(stations)
        self._disk = [0.0] * count
        """when each disk has served all that it was asked for"""
        self._computed = [Signal() for _ in stations]
        self._told = [Signal() for _ in stations]
        """a header has arrived from the member before"""
        self._told_back = [Signal() for _ in stations]
        """a header has arrived from the member after"""
        self._threads_left = [1 if at == count - 1 else 2 for at in range(count)]
        self._exchanged, self._updated = [0.0] * count, [0.0] * count

    def run(self) -> Summed:
        for at, station in enumerate(self.stations):
            self.clock.start(self._pass_sums(at), station.computed_seconds)
            if at < len(self.stations) - 1:
                self.clock.start(self._pass_means(at), station.computed_seconds)
        self.clock.run()
        assert not any(self._threads_left)
        return Summed(makespan=max(self._updated), doings=self.doings, exchanged=self._exchanged, updated=self._updated)

    def _pass_sums(self, at: int) -> Thread:
        station = self.stations[at]
        source = self.up[at - 1] if at else None
        last = at == len(self.stations) - 1
        onward = self.down[at - 1] if last else self.up[at]
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
            if station.gradients == "disk":
                yield self._on_disk(at, disk_seconds(station.read, station.slots * size, station.slots))
            yield self.clock.now + copy_seconds(station.slots * size)
            if last:
                yield self._stored(at, size)
            self.links.send(onward, piece)
            if piece:
                yield onward.sent[piece - 1]
        yield onward.sent[-1]
        self._thread_ends(at)

    def _pass_means(self, at: int) -> Thread:
        source = self.down[at]
        onward = self.down[at - 1] if at else None
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
        return self._on_disk(at, disk_seconds(station.write, size))

    def _take(self, source: MessageQueue, piece: int) -> Thread:
        yield source.arrived[piece]
        if piece + UNDER_WAY < len(self.pieces):
            self.links.open(source, slice(piece + UNDER_WAY, piece + UNDER_WAY + 1))

    def _open(self, source: MessageQueue | None) -> None:
        if source is not None:
            self.links.open(source, slice(UNDER_WAY))

    def _thread_ends(self, at: int) -> None:
        self._threads_left[at] -= 1
        if self._threads_left[at]:
            return
        self._exchanged[at] = self.clock.now
        self._updated[at] = self.clock.now + whole_update_seconds(self.stations[at], self.pieces)

    def _on_disk(self, at: int, seconds: float) -> float:
        """When a request that is made now is done."""
        self._disk[at] = max(self._disk[at], self.clock.now) + seconds
        return self._disk[at]
