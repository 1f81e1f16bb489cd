"""Overlaps transfers with computation: issues reads and fetches ahead of their users, and spills in the disk's idle
time.

The drafted schedule reads each tensor when it is needed and spills it when it is made, so the step waits for the disk.
One pass forward in time decides, whenever the disk falls idle, what it does next ("read" stands for fetches too):

- a read has a latest start at which it, and every read after it, still lands in time; until then spills go first;
- a read is issued earlier than needed only if its tensor fits beside everything else that is resident until its user
  runs;
- of reads that are needed at nearly the same time the largest may go first: where memory is short, it finds no room any
  more beside small ones, while these, read last, are hardly waited for;
- the free of a spilled tensor is held back until its write is done; if its bytes are needed before, the step waits for
  the write.

All other entries keep their order, so the resident bytes never exceed the limit if they did not before. A `FreeMemory`
decides what fits: `FreeBytes` counts bytes, `tightfit.planner.schedule.prefetch_in_place` also knows where each tensor
lies in the arena.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.problem.step_graph import STATES, SUM, state_names
from tightfit.planner.schedule.lowering import DraftInstruction, live_profile

LEADS = (1.05, 1.5, 3.0)
"""factors by which the passes, one after the other, assume transfers to take longer than measured: the larger, the
earlier reads start
"""
LITTLE = 1e-4
"""share of a step's time whose gain is not worth another pass, or a fuller arena"""
Inputs = Mapping[tuple[int, int], tuple[str, ...]]
Counts = npt.NDArray[np.int64]
"""bytes by drafted entry"""


@dataclass(frozen=True, kw_only=True)
class ScheduleTiming:
    """Seconds of a schedule."""

    seconds: float
    stalls: float
    """seconds of them in which computation waits for the disk"""


class FreeMemory(Protocol):
    """The free memory, as a pass asks for it and uses it. Positions are those of the drafted entries."""

    def crowded(self, index: int) -> bool:
        """Whether the tensors that the entry makes do not fit beside those whose frees are held back."""
        ...

    def opens(self, at: int, index: int) -> int:
        """The first position, not before `index`, at which the read drafted at `at` may fit until its user runs:
        `index` if it does there, otherwise where to ask again.
        """
        ...

    def take(self, at: int, index: int) -> None:
        """Issue the read drafted at `at` before the entry at `index`."""
        ...

    def hold(self, index: int) -> None:
        """Hold back the free at `index`: its tensor stays for now."""
        ...

    def give(self, index: int, now: int) -> None:
        """Carry out the free at `index`, which was held back, before the entry at `now`."""
        ...


AnyMemory = TypeVar("AnyMemory", bound=FreeMemory)


def prefetch(
    entries: tuple[DraftInstruction, ...],
    inputs: Inputs,
    resident: Iterable[str],
    sizes: Mapping[str, int],
    limit: int,
) -> tuple[DraftInstruction, ...]:
    """`entries` with transfers issued earlier and spilled tensors freed later, within `limit` bytes resident.

    `inputs`: tensors read by the operator (layer, operator).
    """
    facts = facts_of(entries, frozenset(resident), sizes)
    orders = fast_orders(facts, inputs, lambda: FreeBytes(facts, limit))
    return tuple(entries[index] for index in orders[0][0]) if orders else entries


def fast_orders(
    facts: ScheduleFacts, inputs: Inputs, new_memory: Callable[[], AnyMemory], cutoff: Cutoff = NEVER
) -> list[tuple[list[int], AnyMemory]]:
    """Orders of the entries that are faster than the draft, the fastest first: positions of the entries, and the room
    as the pass left it. The first that is looked for has reads in the order in which they are needed; where computation
    waits in it, another has the largest of nearby reads first.

    Each is the fastest of a few passes, one for each of `LEADS`, which end with the first that leaves hardly any
    stalls, or that is not faster than one before. Raises TimeoutError where `cutoff` strikes.
    """
    entries = facts.entries
    drafted = clock(entries, inputs)
    if not drafted.stalls and drafted.seconds <= sum(entry.seconds for entry in entries) * (1 + 1e-9):
        return []
    found: list[tuple[float, list[int], AnyMemory]] = []
    waiting = False
    queues = [list(range(len(facts.reads)))]
    if (largest_first := _largest_first(facts)) != queues[0]:
        queues.append(largest_first)
    for queue in queues:
        best: tuple[list[int], AnyMemory] | None = None
        shortest = drafted.seconds
        for lead in LEADS:
            cutoff.check()
            memory = new_memory()
            order = _PrefetchPass(facts, inputs, memory, queue, lead).schedule()
            timing = clock([entries[index] for index in order], inputs)
            # A longer lead fills more memory, and a full arena is harder to pack: it has to gain something in return.
            faster = timing.seconds < shortest * (1 - LITTLE)
            if faster:
                best, shortest = (order, memory), timing.seconds
            waiting = timing.stalls > LITTLE * timing.seconds
            if not waiting or (best is not None and not faster):
                break
        if best is not None:
            found.append((shortest, *best))
        if not waiting:
            break
    return [(order, memory) for _, order, memory in sorted(found, key=lambda each: each[0])]


def _largest_first(facts: ScheduleFacts) -> list[int]:
    """The reads' numbers in the order in which they are needed, except that a read goes before smaller ones that are
    needed earlier by less than it takes itself, where the disk has time for all reads so far before these are needed.
    """
    queue: list[int] = []
    total = 0.0
    for number, at in enumerate(facts.reads):
        seconds = facts.read_seconds(number)
        total += seconds
        place = len(queue)
        while place and facts.read_seconds(queue[place - 1]) < seconds:
            needed = facts.begins[facts.reads[queue[place - 1]]]
            if needed < total or needed <= facts.begins[at] - seconds:
                break
            place -= 1
        queue.insert(place, number)
    return queue


def clock(entries: Sequence[DraftInstruction], inputs: Inputs) -> ScheduleTiming:
    """Seconds and stalls of the entries, on one sequential compute timeline and one disk that serves requests in the
    order of issue.
    """
    now = disk = stalls = 0.0
    filled: dict[str, float] = {}
    written: dict[str, float] = {}
    for entry in entries:
        verb = entry.verb
        done = now
        if verb == "free":
            # A tensor that is being written may be read meanwhile, but not freed.
            done = max(done, written.pop(entry.name, now), filled.pop(entry.name, now))
        elif filled:
            for name in _read_by(entry, inputs):
                if name in filled:
                    done = max(done, filled.pop(name))
        stalls += done - now
        now = done
        if entry.transfer:
            disk = max(disk, now) + entry.transfer
            (written if verb == "spill" else filled)[target_of(entry)] = disk
        now += entry.seconds
    return ScheduleTiming(seconds=max(now, disk), stalls=stalls)


def _read_by(entry: DraftInstruction, inputs: Inputs) -> tuple[str, ...]:
    """Tensors whose transfers must have landed before the entry begins."""
    if entry.verb == "run":
        return inputs[entry.layer, entry.operator]
    if entry.verb == "unpack":
        return (f"packed:{entry.name}",)
    if entry.verb == "update":
        return (entry.name, *state_names(entry.name, STATES))
    if entry.verb == "accumulate":
        return (f"{SUM}{entry.name}",)
    return ()


def target_of(entry: DraftInstruction) -> str:
    """The tensor that the transfer fills (read, fetch) or copies (spill)."""
    return f"packed:{entry.name}" if entry.verb == "read" else entry.name


@dataclass(frozen=True, kw_only=True)
class ScheduleFacts:
    """Facts about the drafted schedule that all passes share."""

    entries: tuple[DraftInstruction, ...]
    sizes: Mapping[str, int]
    live: Counts
    """bytes resident during each entry: with the tensors that it makes and those that it frees"""
    begins: list[float]
    """seconds at which each entry would begin if computation never waited for the disk"""
    reads: tuple[int, ...]
    """positions of reads and fetches, in order"""
    earliest: tuple[int, ...]
    """per read: the first position at which an earlier copy of its tensor is no longer resident"""

    def read_seconds(self, number: int) -> float:
        """Seconds that the disk takes for a read."""
        return self.entries[self.reads[number]].transfer


def facts_of(entries: tuple[DraftInstruction, ...], start: frozenset[str], sizes: Mapping[str, int]) -> ScheduleFacts:
    """Facts of a draft that begins with the tensors `start` resident; `sizes` in bytes."""
    now = 0.0
    begins: list[float] = []
    reads: list[int] = []
    earliest: list[int] = []
    freed: dict[str, int] = {}
    for index, entry in enumerate(entries):
        begins.append(now)
        now += entry.seconds
        if entry.verb == "free":
            freed[entry.name] = index + 1
        elif entry.verb in {"read", "fetch"}:
            reads.append(index)
            earliest.append(freed.get(target_of(entry), 0))
    return ScheduleFacts(
        entries=entries,
        sizes=sizes,
        live=np.array(live_profile(entries, start, sizes), dtype=np.int64),
        begins=begins,
        reads=tuple(reads),
        earliest=tuple(earliest),
    )


class FreeBytes:
    """`FreeMemory` by counting bytes: a tensor fits if the resident bytes stay within `limit`."""

    def __init__(self, facts: ScheduleFacts, limit: int) -> None:
        self.facts = facts
        self.free = limit - facts.live
        self.held = 0
        """bytes of the tensors whose frees are held back"""

    def crowded(self, index: int) -> bool:
        return bool(self.held > self.free[index])

    def opens(self, at: int, index: int) -> int:
        size = self._size(at)
        if self.held + size > self.free[index]:
            return index + 1
        full = np.flatnonzero(self.free[index:at] < size)
        return index + int(full[-1]) + 1 if full.size else index

    def take(self, at: int, index: int) -> None:
        self.free[index:at] -= self._size(at)

    def hold(self, index: int) -> None:
        self.held += self._size(index)

    def give(self, index: int, now: int) -> None:
        self.held -= self._size(index)

    def _size(self, index: int) -> int:
        return self.facts.sizes[target_of(self.facts.entries[index])]


class _PrefetchPass:
    """One pass over the entries, which simulates computation and disk and decides when each transfer is issued. Reads
    go in the order of `queue`, their numbers, except where one is needed before its turn.
    """

    def __init__(
        self, facts: ScheduleFacts, inputs: Inputs, memory: FreeMemory, queue: Sequence[int], lead: float
    ) -> None:
        self.facts = facts
        self.inputs = inputs
        self.memory = memory
        self.latest = self._latest_starts(queue, lead)
        self.result: list[int] = []
        self.now = self.disk = 0.0
        self.waited = 0.0
        """seconds of stalls so far"""
        self.queue = deque(queue)
        """numbers of the reads that are still to be issued, the next one first; later ones may be issued already"""
        self.issued: set[int] = set()
        """positions of the reads that are issued"""
        self.landing: dict[str, float] = {}
        """tensor being read or fetched -> when it has landed"""
        self.spills: deque[int] = deque()
        """positions of spills that were reached and are not yet issued"""
        self.unwritten: dict[str, float] = {}
        """spilled tensor -> when its write is done; infinite while the spill is not issued"""
        self.waiting: deque[int] = deque()
        """positions of frees that are held back until their tensors are written"""
        self.held_names: set[str] = set()
        """tensors that those would free"""
        self.blocked = 0
        """position before which the next read does not fit"""

    def _latest_starts(self, queue: Sequence[int], lead: float) -> list[float]:
        """Per read: when it must start at the latest so that it and all later ones land in time, in seconds of a step
        without stalls.
        """
        starts = [0.0] * len(self.facts.reads)
        following = float("inf")
        for number in reversed(queue):
            needed = self.facts.begins[self.facts.reads[number]]
            following = min(needed, following) - lead * self.facts.read_seconds(number)
            starts[number] = following
        return starts

    def schedule(self) -> list[int]:
        """Positions of the entries in their new order."""
        entries = self.facts.entries
        for index, entry in enumerate(entries):
            while self.waiting and self.unwritten[entries[self.waiting[0]].name] <= self.now:
                self._give_back(index)
            if entry.verb in {"read", "fetch"}:
                if index not in self.issued:
                    self._make_room(index, entry)
                    self._issue_read(index, index)
            elif entry.verb == "spill":
                self.spills.append(index)
                self.unwritten[entry.name] = float("inf")
            elif entry.verb == "free" and self.unwritten.get(entry.name, 0.0) > self.now:
                self.waiting.append(index)
                self.held_names.add(entry.name)
                self.memory.hold(index)
            else:
                self._make_room(index, entry)
                begin = self._ready(entry)
                self._fill_disk(index, begin + entry.seconds)
                if entry.verb == "free":
                    self.unwritten.pop(entry.name, None)
                self.result.append(index)
                self._wait(begin)
                self.now += entry.seconds
        while self.spills:
            self._issue_spill()
        while self.waiting:
            self._give_back(len(entries))
        return self.result

    def _wait(self, until: float) -> None:
        self.waited += max(0.0, until - self.now)
        self.now = max(self.now, until)

    def _ready(self, entry: DraftInstruction) -> float:
        """When all tensors that the entry reads have landed."""
        ready = self.now
        if self.landing:
            for name in _read_by(entry, self.inputs):
                ready = max(ready, self.landing.pop(name, 0.0))
        return ready

    def _make_room(self, index: int, entry: DraftInstruction) -> None:
        """Wait for writes, and carry out the frees that are held back, until the entry's tensors fit and no old copy of
        the tensor it fetches is left.
        """
        while self.waiting and (entry.name in self.held_names or self.memory.crowded(index)):
            self._give_back(index)

    def _fill_disk(self, index: int, until: float) -> None:
        """Issue the transfers that the disk is to begin before `until`, the time at which the entry at `index` ends."""
        while True:
            begin = max(self.disk, self.now)
            if begin >= until and self.disk > self.now:
                return
            spill = self.facts.entries[self.spills[0]] if self.spills else None
            urgent = max(begin + spill.transfer, until) if spill is not None else until
            if self.queue and self._read_is_due(self.queue[0], index, urgent):
                self._issue_read(self.facts.reads[self.queue[0]], index)
            elif spill is not None and begin < until:
                self._issue_spill()
            else:
                return

    def _read_is_due(self, number: int, index: int, urgent: float) -> bool:
        """Whether the read, which is the next, has to start by `urgent`, and fits from here to its user."""
        if index < self.blocked:
            return False
        facts = self.facts
        if self.latest[number] + self.waited > urgent:
            return False
        at = facts.reads[number]
        target = target_of(facts.entries[at])
        if index < facts.earliest[number] or target in self.held_names:
            return False
        self.blocked = self.memory.opens(at, index)
        return self.blocked == index

    def _issue_read(self, at: int, index: int) -> None:
        """Issue the read drafted at `at` before the entry at `index`."""
        entry = self.facts.entries[at]
        self.memory.take(at, index)
        self.disk = max(self.disk, self.now) + entry.transfer
        self.landing[target_of(entry)] = self.disk
        self.now += entry.seconds
        self.result.append(at)
        self.issued.add(at)
        while self.queue and self.facts.reads[self.queue[0]] in self.issued:
            self.queue.popleft()
            self.blocked = 0

    def _issue_spill(self) -> None:
        index = self.spills.popleft()
        entry = self.facts.entries[index]
        self.disk = max(self.disk, self.now) + entry.transfer
        self.unwritten[entry.name] = self.disk
        self.now += entry.seconds
        self.result.append(index)

    def _give_back(self, now: int) -> None:
        """Carry out the free that has been held back longest, after waiting for its tensor's write."""
        index = self.waiting.popleft()
        name = self.facts.entries[index].name
        while self.unwritten[name] == float("inf"):
            self._issue_spill()
        self._wait(self.unwritten.pop(name))
        self.held_names.discard(name)
        self.memory.give(index, now)
        self.result.append(index)
