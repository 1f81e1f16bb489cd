"""A clock for several devices: threads that sleep and wait for signals, and links over which they send.

A message from i to j takes latency_i + latency_j + bytes / min(up_i, down_j). It occupies i's uplink for bytes / up_i,
and j's downlink for bytes / down_j. Either serves one message at a time: of those that could start, the one that was sent
first. A message starts once its target can receive it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from tightfit.planner.fleet.schema import Does, Link


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
class Stream:
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


class Links:
    """The uplinks and downlinks of devices, on a clock."""

    def __init__(
        self, clock: Clock, links: Sequence[Link], sends: Callable[[Stream, int, float, float], object]
    ) -> None:
        """`sends` is called with each message as it starts: its stream and number, when it starts and has left."""
        self._clock, self._links, self._sends = clock, links, sends
        self._up, self._down = [0.0] * len(links), [0.0] * len(links)
        """when each uplink and downlink is free"""
        self._waiting: list[tuple[Stream, int]] = []
        """messages, in the order in which they were sent"""

    def send(self, stream: Stream, number: int) -> None:
        self._waiting.append((stream, number))
        self._serve()

    def open(self, stream: Stream, numbers: slice) -> None:
        """The target can receive these messages."""
        stream.room[numbers] = [True] * len(stream.room[numbers])
        self._serve()

    def latency(self, source: int, target: int) -> float:
        return self._links[source].latency_seconds + self._links[target].latency_seconds

    def _serve(self) -> None:
        """Start every message whose links are free and whose target can receive it."""
        clock, waiting = self._clock, []
        for stream, number in self._waiting:
            source, target = stream.source, stream.target
            if not stream.room[number] or max(self._up[source], self._down[target]) > clock.now:
                waiting.append((stream, number))
                continue
            size = stream.sizes[number]
            up = size / self._links[source].up_bytes_per_second
            down = size / self._links[target].down_bytes_per_second
            self._up[source], self._down[target] = clock.now + up, clock.now + down
            left = clock.now + max(up, down)
            clock.at(clock.now + min(up, down), self._serve)
            clock.at(left, partial(clock.give, stream.sent[number]))
            clock.at(left, self._serve)
            clock.at(left + self.latency(source, target), partial(clock.give, stream.arrived[number]))
            self._sends(stream, number, clock.now, left)
        self._waiting = waiting


@dataclass(frozen=True, kw_only=True)
class Doing:
    """What a device, or the link from one to another, does from `begin` to `end`."""

    what: Does
    station: int
    to: int | None = None
    number: int | None = None
    """of the micro-batch, or of the piece"""
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Played:
    """One step, in seconds from its beginning."""

    makespan: float
    doings: list[Doing]


class Step:
    """What devices do in a step, on a clock of its own with their links."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.clock = Clock()
        self.links = Links(self.clock, links, self._sends)
        self.doings: list[Doing] = []

    def does(self, what: Does, station: int, begun: float, end: float | None = None, number: int | None = None) -> None:
        """A device has done something since `begun`, until now unless `end` says until when it will."""
        until = self.clock.now if end is None else end
        self.doings.append(Doing(what=what, station=station, number=number, begin=begun, end=until))

    def _sends(self, stream: Stream, number: int, begin: float, end: float) -> None:
        one = Doing(what="send", station=stream.source, to=stream.target, number=number, begin=begin, end=end)
        self.doings.append(one)
