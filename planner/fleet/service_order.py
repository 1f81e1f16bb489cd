"""In which order a server serves the devices of a round, one at a time, so that the last answer comes as soon as can be.

This is scheduling one machine with heads and tails (1 | r, q | Cmax; Carlier 1982), in which every job has ways to be
done. Device j may begin once its head is over, h_j seconds after the round begins; the server is busy with it for p_j;
its answer has arrived t_j after that. A way says h, p and t at once: the lower layers that the device holds. CP-SAT
chooses the ways and the order. Where it does not finish, the order stands beside the better of its bound and that of
Jackson's preemptive schedule: with the smallest h, p and t of every device, the server always works on the device of the
longest tail among those that have come, and may leave it for a longer one. Numbers in brackets are those of the blocks in
docs/formulation.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from tightfit.planner.solvers.cp_sat import single_worker, solved

MOST_WAYS = 2000
"""of all devices together: with more, the order is by tails and the bound is Jackson's, without a search"""
TICKS = 10_000_000
"""CP-SAT counts in whole numbers: so many make up the makespan of the first order. Seconds are rounded down, so that what
it proves holds"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to serve a device, in seconds."""

    head: float
    """from when the round begins until the device is ready"""
    service: float
    tail: float
    """from when it has been served until its answer has arrived"""


@dataclass(frozen=True, kw_only=True)
class Served:
    """One device as it is served."""

    device: int
    way: int
    begin: float
    end: float
    answered: float


@dataclass(frozen=True, kw_only=True)
class Serving:
    """All devices in the order in which they are served."""

    served: list[Served]
    bound: float
    """seconds that no order and no ways undercut"""

    @property
    def makespan(self) -> float:
        return max(one.answered for one in self.served)


def served(ways: Sequence[Sequence[Way]], order: Sequence[tuple[int, int]]) -> list[Served]:
    """The devices served in an order of (device, way), each as early as can be."""
    result, free = [], 0.0
    for device, way in order:
        one = ways[device][way]
        begin = max(free, one.head)
        free = begin + one.service
        result.append(Served(device=device, way=way, begin=begin, end=free, answered=free + one.tail))
    return result


def jackson_bound(jobs: Sequence[Way]) -> float:
    """Seconds of Jackson's preemptive schedule of the jobs, which no order undercuts."""
    coming = sorted((one.head, one.tail, one.service) for one in jobs)
    waiting: list[list[float]] = []
    """[-tail, seconds of service that are left]"""
    now, longest = 0.0, 0.0
    while coming or waiting:
        while coming and coming[0][0] <= now:
            _, tail, service = coming.pop(0)
            heapq.heappush(waiting, [-tail, service])
        if not waiting:
            now = coming[0][0]
            continue
        first = waiting[0]
        until = coming[0][0] if coming else math.inf
        worked = min(first[1], until - now)
        now += worked
        first[1] -= worked
        if first[1] <= 0 or now + first[1] == now:
            longest = max(longest, now - first[0])
            heapq.heappop(waiting)
    return longest


def best_order(ways: Sequence[Sequence[Way]], time_limit: float) -> Serving:
    """The order, and a way for each device, with which the last answer comes first, as found within `time_limit` seconds.

    Each device has a way at least. Raises KeyboardInterrupt on Ctrl-C.
    """
    least = [
        Way(
            head=min(one.head for one in own),
            service=min(one.service for one in own),
            tail=min(one.tail for one in own),
        )
        for own in ways
    ]
    known = _by_tails(ways)
    makespan = max(one.answered for one in known)
    bound = min(makespan, jackson_bound(least))
    if bound < makespan and sum(map(len, ways)) <= MOST_WAYS:
        found, proven = _searched(ways, known, makespan, time_limit)
        known = min(known, found, key=lambda all_served: max(one.answered for one in all_served))
        bound = max(bound, proven)
    return Serving(served=known, bound=min(bound, max(one.answered for one in known)))


def _by_tails(ways: Sequence[Sequence[Way]]) -> list[Served]:
    """Each device in its shortest way; of those that are ready, the one with the longest tail first."""
    quickest = [min(range(len(own)), key=lambda way: (own[way].service, own[way].tail, own[way].head)) for own in ways]
    chosen = [own[way] for own, way in zip(ways, quickest)]
    coming = sorted(range(len(ways)), key=lambda one: chosen[one].head, reverse=True)
    ready: list[tuple[float, int]] = []
    order, now = [], 0.0
    while coming or ready:
        if not ready:
            now = max(now, chosen[coming[-1]].head)
        while coming and chosen[coming[-1]].head <= now:
            one = coming.pop()
            heapq.heappush(ready, (-chosen[one].tail, one))
        _, one = heapq.heappop(ready)
        order.append((one, quickest[one]))
        now += chosen[one].service
    return served(ways, order)


def _searched(
    ways: Sequence[Sequence[Way]], known: Sequence[Served], makespan: float, time_limit: float
) -> tuple[list[Served], float]:
    """What CP-SAT finds, `known` where it finds nothing; and its bound in seconds."""
    tick = makespan / TICKS
    model = cp_model.CpModel()
    last = model.new_int_var(0, TICKS, "makespan")
    intervals, begins, taken = [], [], []
    for device, own in enumerate(ways):
        begin = model.new_int_var(0, TICKS, f"begin {device}")
        chosen = [model.new_bool_var(f"way {device} {number}") for number in range(len(own))]
        model.add_exactly_one(chosen)  # (46)
        for number, way in enumerate(own):
            head, service, tail = (math.floor(one / tick) for one in (way.head, way.service, way.tail))
            present = chosen[number]
            end = model.new_int_var(0, 2 * TICKS, f"end {device} {number}")
            intervals.append(
                model.new_optional_interval_var(begin, service, end, present, f"service {device} {number}")
            )
            model.add(begin >= head).only_enforce_if(present)  # (47)
            model.add(last >= end + tail).only_enforce_if(present)  # (48)
        begins.append(begin)
        taken.append(chosen)
    model.add_no_overlap(intervals)  # (47)
    model.minimize(last)  # (48)
    for one in known:
        model.add_hint(begins[one.device], math.floor(one.begin / tick))
        for number, present in enumerate(taken[one.device]):
            model.add_hint(present, number == one.way)
    solver = single_worker()
    solver.parameters.max_time_in_seconds = max(0.1, time_limit)
    status = solved(solver, model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return list(known), 0.0
    order = sorted(range(len(ways)), key=lambda device: (solver.value(begins[device]), device))
    found = [(device, next(n for n, chosen in enumerate(taken[device]) if solver.value(chosen))) for device in order]
    return served(ways, found), solver.best_objective_bound * tick
