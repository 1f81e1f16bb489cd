"""Transfers moved into free memory: reads and fetches ahead of their users, frees of spilled tensors behind the write.

The schedule as drafted reads everything when it is needed and frees a spilled tensor when it was last read, so the step
waits for the disk. Two passes, each optimal for its own kind given the other's places:

- backward in time, a read is issued just early enough to land before its user, or as early as memory allows;
- forward in time, a spilled tensor is freed once it is written, or when its bytes are needed, whichever is first.

Nothing else changes place, so the bytes resident never exceed the limit if they did not before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from planner.emit import Entry, made_by
from planner.graph import STATES

LEADS = (1.05, 1.5, 3.0)
"""how much longer than measured a transfer may take, as the passes assume it: the best for the whole step is taken"""
Inputs = Mapping[tuple[int, int], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Timing:
    seconds: float
    stalls: float
    """seconds spent waiting for the disk"""


def overlap(
    entries: tuple[Entry, ...], inputs: Inputs, resident: Iterable[str], sizes: Mapping[str, int], limit: int
) -> tuple[Entry, ...]:
    """`entries` with transfers issued earlier and spilled tensors freed later, within `limit` bytes resident.

    `inputs`: tensors read by the operator (layer, operator).
    """
    start = frozenset(resident)
    best, shortest = entries, clock(entries, inputs).seconds
    if not any(entry.transfer for entry in entries):
        return entries
    for lead in LEADS:
        moved = _put_off_frees(_hasten_reads(entries, start, sizes, limit, lead), start, sizes, limit, lead)
        seconds = clock(moved, inputs).seconds
        if seconds < shortest * (1 - 1e-6):
            best, shortest = tuple(moved), seconds
    return best


def clock(entries: Sequence[Entry], inputs: Inputs) -> Timing:
    """One sequential compute timeline, one disk that serves requests in the order they are issued."""
    now = disk = stalls = 0.0
    filled: dict[str, float] = {}
    written: dict[str, float] = {}
    for entry in entries:
        waited: list[float] = []
        if entry.verb == "run":
            waited = [filled.pop(name) for name in inputs[entry.layer, entry.operator] if name in filled]
        elif entry.verb == "unpack":
            waited = [filled.pop(f"packed:{entry.name}", now)]
        elif entry.verb == "update":
            waited = [filled.pop(f"{state}:{entry.name}", now) for state in STATES]
        elif entry.verb == "free":
            # A tensor that is being written may be read meanwhile, but not given back.
            waited = [written.pop(entry.name, now), filled.pop(entry.name, now)]
        done = max([now, *waited])
        stalls += done - now
        now = done
        if entry.transfer:
            disk = max(disk, now) + entry.transfer
            (written if entry.verb == "spill" else filled)[_target(entry)] = disk
        now += entry.seconds
    return Timing(seconds=max(now, disk), stalls=stalls)


def _target(entry: Entry) -> str:
    """The tensor that the transfer fills or copies."""
    return f"packed:{entry.name}" if entry.verb == "read" else entry.name


def _changes(
    entries: Sequence[Entry], start: frozenset[str], sizes: Mapping[str, int]
) -> tuple[list[int], list[int], int]:
    """Per entry: bytes made and bytes freed; and the bytes resident at the end."""
    there = set(start)
    live = sum(sizes[name] for name in there)
    made, freed = [], []
    for entry in entries:
        new = [name for name in dict.fromkeys(made_by(entry)) if name not in there]
        there.update(new)
        made.append(sum(sizes[name] for name in new))
        freed.append(sizes[entry.name] if entry.verb == "free" else 0)
        if entry.verb == "free":
            there.remove(entry.name)
        live += made[-1] - freed[-1]
    return made, freed, live


def _hasten_reads(
    entries: Sequence[Entry], start: frozenset[str], sizes: Mapping[str, int], limit: int, lead: float
) -> list[Entry]:
    """From the end of the step to its start: hold a read back (that is, issue it earlier) until it would have landed."""
    made, freed, live = _changes(entries, start, sizes)
    result: list[Entry] = []
    now = disk = 0.0
    waiting: deque[tuple[float, Entry]] = deque()
    names: set[str] = set()

    def issue() -> None:
        nonlocal now, live
        done, entry = waiting.popleft()
        names.discard(_target(entry))
        # Issued late: its user waits for the rest.
        now = max(now, done)
        live -= sizes[_target(entry)]
        result.append(entry)

    for index in range(len(entries) - 1, -1, -1):
        entry = entries[index]
        while waiting and waiting[0][0] <= now:
            issue()
        if entry.verb in {"read", "fetch"}:
            disk = max(disk, now) + lead * entry.transfer
            waiting.append((disk, entry))
            names.add(_target(entry))
            now += entry.seconds
            continue
        if entry.verb == "free":
            while entry.name in names:
                issue()
            while waiting and live + freed[index] > limit:
                issue()
            live += freed[index]
        else:
            if entry.verb == "spill":
                disk = max(disk, now) + entry.transfer
            # Bytes resident during the entry, what it makes included, are what is resident after it.
            live -= made[index]
        result.append(entry)
        now += entry.seconds
    while waiting:
        issue()
    result.reverse()
    return result


def _put_off_frees(
    entries: Sequence[Entry], start: frozenset[str], sizes: Mapping[str, int], limit: int, lead: float
) -> list[Entry]:
    """From the start of the step to its end: free a spilled tensor once it is written, or when its bytes are needed."""
    made, _, _ = _changes(entries, start, sizes)
    live = sum(sizes[name] for name in start)
    result: list[Entry] = []
    now = disk = 0.0
    ready: dict[str, float] = {}
    written: dict[str, float] = {}
    waiting: deque[tuple[float, Entry]] = deque()
    names: set[str] = set()

    def give_back() -> None:
        nonlocal now, live
        done, entry = waiting.popleft()
        names.discard(entry.name)
        now = max(now, done)
        live -= sizes[entry.name]
        result.append(entry)

    for index, entry in enumerate(entries):
        while waiting and waiting[0][0] <= now:
            give_back()
        if entry.verb == "free" and written.get(entry.name, now) > now:
            waiting.append((written[entry.name], entry))
            names.add(entry.name)
            continue
        if entry.verb == "fetch":
            while entry.name in names:
                give_back()
        while waiting and live + made[index] > limit:
            give_back()
        live += made[index]
        if entry.transfer:
            disk = max(disk, now) + (lead if entry.verb == "spill" else 1.0) * entry.transfer
            (written if entry.verb == "spill" else ready)[_target(entry)] = disk
        if entry.verb == "unpack":
            now = max(now, ready.pop(f"packed:{entry.name}", now))
        if entry.verb == "free":
            live -= sizes[entry.name]
            written.pop(entry.name, None)
        result.append(entry)
        now += entry.seconds
    while waiting:
        give_back()
    return result
