"""Transfers moved into free memory: reads and fetches ahead of their users, spills into the disk's idle time.

The schedule as drafted reads everything when it is needed and spills everything when it is made, so the step waits for the
disk. One pass forward in time decides what the disk does next whenever it falls idle:

- a read has a latest start at which it, and every read after it, still lands in time; until then spills go first;
- it is issued earlier than needed only where it fits beside everything that is resident until its user runs;
- a spilled tensor is freed once it is written, or when its bytes are needed, whichever is first.

Nothing else changes place, so the bytes resident never exceed the limit if they did not before. What there is room for a
`Room` says: by default bytes are counted; `tightfit.planner.schedule.prefetch_in_place` knows where everything lies.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tightfit.planner.problem.step_graph import STATES, state_names
from tightfit.planner.schedule.lowering import Entry, live_profile

LEADS = (1.05, 1.5, 3.0)
"""how much longer than measured a transfer may take, as the passes assume it, one after the other"""
LITTLE = 1e-4
"""share of a step's time that is not worth another pass, or a fuller arena"""
Inputs = Mapping[tuple[int, int], tuple[str, ...]]
Counts = npt.NDArray[np.int64]
"""bytes by drafted entry"""


@dataclass(frozen=True, kw_only=True)
class Timing:
    seconds: float
    stalls: float
    """seconds spent waiting for the disk"""


class Room(Protocol):
    """What a pass may ask of memory. Positions are those of the drafted entries."""

    def crowded(self, index: int) -> bool:
        """Whether what the entry makes has no room beside what waits to be freed."""
        ...

    def opens(self, at: int, index: int) -> int:
        """The first position, not before `index`, at which the read at `at` may have room until its user runs."""
        ...

    def take(self, at: int, index: int) -> None:
        """The read at `at` is issued before the entry at `index`."""
        ...

    def hold(self, index: int) -> None:
        """The tensor that the entry frees stays for now."""
        ...

    def give(self, index: int, now: int) -> None:
        """What the entry at `index` frees, and held back, goes before the entry at `now`."""
        ...


AnyRoom = TypeVar("AnyRoom", bound=Room)


def prefetch(
    entries: tuple[Entry, ...],
    inputs: Inputs,
    resident: Iterable[str],
    sizes: Mapping[str, int],
    limit: int,
) -> tuple[Entry, ...]:
    """`entries` with transfers issued earlier and spilled tensors freed later, within `limit` bytes resident.

    `inputs`: tensors read by the operator (layer, operator).
    """
    facts = facts_of(entries, frozenset(resident), sizes)
    found = best_order(facts, inputs, lambda: Bytes(facts, limit))
    return entries if found is None else tuple(entries[index] for index in found[0])


def best_order(
    facts: Facts, inputs: Inputs, room: Callable[[], AnyRoom], deadline: float = float("inf")
) -> tuple[list[int], AnyRoom] | None:
    """The fastest of a few passes, of which the last is the first that leaves little to wait for, or gains
    nothing over one before: positions of the entries in their new order, and the room as the pass has left it.

    None where the draft is as fast. Past `deadline`, on the monotonic clock, there is only the first pass.
    """
    entries = facts.entries
    drafted = clock(entries, inputs)
    if not drafted.stalls and drafted.seconds <= sum(entry.seconds for entry in entries) * (1 + 1e-9):
        return None
    best: tuple[list[int], AnyRoom] | None = None
    shortest = drafted.seconds
    for lead in LEADS:
        if lead != LEADS[0] and time.monotonic() > deadline:
            break
        there = room()
        order = _Disk(facts, inputs, there, lead).schedule()
        timing = clock([entries[index] for index in order], inputs)
        # A longer lead fills more memory, and a full arena is harder to pack: it has to earn that.
        faster = timing.seconds < shortest * (1 - LITTLE)
        if faster:
            best, shortest = (order, there), timing.seconds
        if timing.stalls <= LITTLE * timing.seconds or (best is not None and not faster):
            break
    return best


def clock(entries: Sequence[Entry], inputs: Inputs) -> Timing:
    """One sequential compute timeline, one disk that serves requests in the order they are issued."""
    now = disk = stalls = 0.0
    filled: dict[str, float] = {}
    written: dict[str, float] = {}
    for entry in entries:
        verb = entry.verb
        done = now
        if verb == "free":
            # A tensor that is being written may be read meanwhile, but not given back.
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
    return Timing(seconds=max(now, disk), stalls=stalls)


def _read_by(entry: Entry, inputs: Inputs) -> tuple[str, ...]:
    """What must have landed before the entry begins."""
    if entry.verb == "run":
        return inputs[entry.layer, entry.operator]
    if entry.verb == "unpack":
        return (f"packed:{entry.name}",)
    if entry.verb == "update":
        return state_names(entry.name, len(STATES))
    return ()


def target_of(entry: Entry) -> str:
    """The tensor that the transfer fills or copies."""
    return f"packed:{entry.name}" if entry.verb == "read" else entry.name


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the drafted schedule says, whatever moves."""

    entries: tuple[Entry, ...]
    sizes: Mapping[str, int]
    live: Counts
    """bytes resident during each entry: after what it makes, before what it frees"""
    begins: list[float]
    """seconds at which each entry would begin if nothing ever waited"""
    reads: tuple[int, ...]
    """positions of reads and fetches, in order"""
    earliest: tuple[int, ...]
    """per read: the first position at which what it fills is no longer resident from before"""


def facts_of(entries: tuple[Entry, ...], start: frozenset[str], sizes: Mapping[str, int]) -> Facts:
    """Facts of a draft that opens with the tensors `start` resident."""
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
    return Facts(
        entries=entries,
        sizes=sizes,
        live=np.array(live_profile(entries, start, sizes), dtype=np.int64),
        begins=begins,
        reads=tuple(reads),
        earliest=tuple(earliest),
    )


class Bytes:
    """Room as bytes are counted: whatever fits below the limit, one for all drafted entries or each its own, has a place."""

    def __init__(self, facts: Facts, limit: int | Counts) -> None:
        self.facts = facts
        self.free = limit - facts.live
        self.held = 0
        """bytes of what waits to be freed"""

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


class _Disk:
    """One pass over the entries: what is issued when."""

    def __init__(self, facts: Facts, inputs: Inputs, room: Room, lead: float) -> None:
        self.facts = facts
        self.inputs = inputs
        self.room = room
        self.latest = self._latest_starts(lead)
        self.result: list[int] = []
        self.now = self.disk = 0.0
        self.waited = 0.0
        self.next_read = 0
        self.landing: dict[str, float] = {}
        self.spills: deque[int] = deque()
        """made, not yet issued"""
        self.unwritten: dict[str, float] = {}
        """spilled tensor -> when its write is done; infinite while it is not issued"""
        self.waiting: deque[int] = deque()
        """frees of spilled tensors that nothing reads any more"""
        self.names: set[str] = set()
        """what `waiting` frees"""
        self.blocked = 0
        """position before which the next read has no room"""

    def _latest_starts(self, lead: float) -> list[float]:
        """Per read, in the entries' undisturbed time: when it must start so that it and all later ones land in time."""
        starts = [0.0] * len(self.facts.reads)
        following = float("inf")
        for number in range(len(starts) - 1, -1, -1):
            at = self.facts.reads[number]
            following = min(self.facts.begins[at], following) - lead * self.facts.entries[at].transfer
            starts[number] = following
        return starts

    def schedule(self) -> list[int]:
        """Positions of the entries in their new order."""
        entries = self.facts.entries
        for index, entry in enumerate(entries):
            while self.waiting and self.unwritten[entries[self.waiting[0]].name] <= self.now:
                self._give_back(index)
            if entry.verb in {"read", "fetch"}:
                if self.next_read < len(self.facts.reads) and self.facts.reads[self.next_read] == index:
                    self._make_room(index, entry)
                    self._issue_read(index)
            elif entry.verb == "spill":
                self.spills.append(index)
                self.unwritten[entry.name] = float("inf")
            elif entry.verb == "free" and self.unwritten.get(entry.name, 0.0) > self.now:
                self.waiting.append(index)
                self.names.add(entry.name)
                self.room.hold(index)
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

    def _ready(self, entry: Entry) -> float:
        """When everything that the entry reads has landed."""
        ready = self.now
        if self.landing:
            for name in _read_by(entry, self.inputs):
                ready = max(ready, self.landing.pop(name, 0.0))
        return ready

    def _make_room(self, index: int, entry: Entry) -> None:
        """Wait for writes until the entry's bytes fit; a tensor is not fetched while its old copy is there."""
        while self.waiting and (entry.name in self.names or self.room.crowded(index)):
            self._give_back(index)

    def _fill_disk(self, index: int, until: float) -> None:
        """Issue what the disk is to begin before `until`, when the entry at `index` is through."""
        while True:
            begin = max(self.disk, self.now)
            if begin >= until and self.disk > self.now:
                return
            spill = self.facts.entries[self.spills[0]] if self.spills else None
            urgent = max(begin + spill.transfer, until) if spill is not None else until
            if self._read_is_due(index, urgent):
                self._issue_read(index)
            elif spill is not None and begin < until:
                self._issue_spill()
            else:
                return

    def _read_is_due(self, index: int, urgent: float) -> bool:
        """Whether the next read must start before `urgent`, and has room from here to its user."""
        if self.next_read >= len(self.facts.reads) or index < self.blocked:
            return False
        facts = self.facts
        if self.latest[self.next_read] + self.waited > urgent:
            return False
        at = facts.reads[self.next_read]
        target = target_of(facts.entries[at])
        if index < facts.earliest[self.next_read] or target in self.names:
            return False
        self.blocked = self.room.opens(at, index)
        return self.blocked == index

    def _issue_read(self, index: int) -> None:
        at = self.facts.reads[self.next_read]
        entry = self.facts.entries[at]
        self.room.take(at, index)
        self.disk = max(self.disk, self.now) + entry.transfer
        self.landing[target_of(entry)] = self.disk
        self.now += entry.seconds
        self.result.append(at)
        self.next_read += 1
        self.blocked = 0

    def _issue_spill(self) -> None:
        index = self.spills.popleft()
        entry = self.facts.entries[index]
        self.disk = max(self.disk, self.now) + entry.transfer
        self.unwritten[entry.name] = self.disk
        self.now += entry.seconds
        self.result.append(index)

    def _give_back(self, now: int) -> None:
        """Free the spilled tensor that has waited longest, once it is written."""
        index = self.waiting.popleft()
        name = self.facts.entries[index].name
        while self.unwritten[name] == float("inf"):
            self._issue_spill()
        self._wait(self.unwritten.pop(name))
        self.names.discard(name)
        self.room.give(index, now)
        self.result.append(index)
