"""The programs by which work is shared out: micro-batches of a step, steps of a round, and the order in which a server
serves.

- `allot` (HiGHS) allots the micro-batches of a step: who takes part, who is first and last, how many each computes,
  shelves. It knows a member by its ways to take part: a role in the chain, shelves, and for a range of micro-batches
  the seconds of one. Those seconds are lower bounds, or those of plans; its rows are the lower bounds of `bounds`. So
  with lower bounds its optimum is one on the makespan of every allotment, order, choice of shelves and plans.
- `shared_out` shares the steps of a round out to devices that wait for nobody. One that takes k steps has answered
  after f + k·s seconds, where f is for transfers and the start of its run, and s is a step; one that takes none is not
  waited for. So the times at which one more step of some device would end are the numbers f + s, f + 2s, … of every
  device, and a round of n steps in all cannot end before the n-th smallest of them: of the steps before it there are
  fewer than n. Taking the steps with the n smallest times ends exactly then, so that this is a best answer, and with
  times that are lower bounds a lower bound.
- `best_order` (CP-SAT) chooses the order in which a server serves devices, one at a time, and a way for each. This is
  scheduling one machine with heads and tails (1 | r, q | Cmax; Carlier 1982). Device j may begin once its head is over,
  h_j seconds after the round begins; the server is busy with it for p_j; its answer has arrived t_j after that. A way
  says h, p and t at once: the lower layers that the device holds. Where the search does not finish, the order stands
  beside the better of its bound and that of Jackson's preemptive schedule: with the smallest h, p and t of every
  device, the server always works on the device of the longest tail among those that have come, and may leave it for a
  longer one.

Numbers in brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from tightfit.planner.fleet.bounds import Role, Row, Terms
from tightfit.planner.fleet.schema import Shelf
from tightfit.planner.solvers.cp_sat import single_worker, solved
from tightfit.planner.solvers.highs import MARGIN
from tightfit.planner.solvers.lp import Linear, LinearProgram

MS = 1e3
"""the program counts in milliseconds, so that its numbers are neither huge nor tiny"""
MOST_WAYS = 2000
"""of all devices together: with more, the order is by tails and the bound is Jackson's, without a search"""
TICKS = 10_000_000
"""CP-SAT counts in whole numbers: so many make up the makespan of the first order. Seconds are rounded down, so that
what it proves holds
"""


# --- micro-batches of a step ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Joining:
    """A way in which a member can take part."""

    member: int
    role: Role
    gradients: Shelf
    states: Shelf
    least: int
    most: int
    """micro-batches"""
    seconds: float
    """of one micro-batch"""
    terms: Terms


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A way that was chosen, with its number of micro-batches."""

    way: Joining
    micro_batches: int


@dataclass(frozen=True, kw_only=True)
class Allotment:
    taken: list[Taken]
    """none where the time limit came first"""
    bound_seconds: float
    """no allotment among the ways has a lower makespan, as the program states it"""


def allot(ways: Sequence[Joining], micro_batches: int, *, time_limit: float, gap: float) -> Allotment | None:
    """The best allotment to a chain of at least two, to a relative `gap`; None: the ways do not allow any."""
    program = LinearProgram()
    makespan, computed = program.variable(), program.variable()
    taken = [program.choice() for _ in ways]
    counts = [program.variable(0.0, float(way.most), whole=True) for way in ways]
    # (36) micro-batches of a way that is taken, roles of the chain, all micro-batches
    for way, chosen, count in zip(ways, taken, counts):
        program.at_least(Linear().add(count), Linear().add(chosen, float(way.least)))
        program.at_least(Linear().add(chosen, float(way.most)), Linear().add(count))
    in_role = {
        role: Linear.sum(chosen for way, chosen in zip(ways, taken) if way.role == role)
        for role in ("first", "between", "beside", "last")
    }
    program.exactly(in_role["first"], 1.0)
    program.exactly(in_role["last"], 1.0)
    program.at_least(Linear(1.0), in_role["beside"])
    members = sorted({way.member for way in ways})
    program.at_least(Linear().plus(in_role["beside"], float(len(members))), in_role["between"])
    program.exactly(Linear.sum(counts), float(micro_batches))
    # (40) the first piece travels to the last member, or the one beside it, and the last mean travels back
    first = Linear()
    for way, count in zip(ways, counts):
        if way.role == "first":
            first.add(count, MS * way.seconds)
    for turn, others in (("last", ("first", "between", "beside")), ("beside", ("first", "between"))):
        turning, round_trip = Linear(), Linear()
        for way, chosen, count in zip(ways, taken, counts):
            if way.role == turn:
                turning.add(chosen, MS * way.terms.turning)
                round_trip.add(chosen, MS * way.terms.turned)
            elif way.role in others:
                turning.add(chosen, MS * way.terms.back)
                round_trip.add(chosen, MS * (way.terms.there.fixed + way.terms.back))
                round_trip.add(count, MS * way.terms.there.each)
        program.at_least(Linear().add(makespan), Linear().add(computed), turning)
        program.at_least(Linear().add(makespan), first, round_trip)
    ways_of: dict[int, list[int]] = {member: [] for member in members}
    for number, way in enumerate(ways):
        ways_of[way.member].append(number)
    for own in ways_of.values():
        # (36) at most one way per member
        program.at_least(Linear(1.0), Linear.sum(taken[number] for number in own))
        # (37) a member has computed before the last one has
        computing = Linear()
        for number in own:
            computing.add(counts[number], MS * ways[number].seconds)
        program.at_least(Linear().add(computed), computing)
        # (38) what a member has left to do once the last has computed, its common rows
        # (39) what it has left to do once it has computed itself, its own rows
        for kind, begin in (("common", Linear().add(computed)), ("own", computing)):
            rows: list[list[Row]] = [getattr(ways[number].terms, kind) for number in own]
            for at in range(max(map(len, rows))):
                beyond = Linear()
                for number, listed in zip(own, rows):
                    if at < len(listed):
                        beyond.add(taken[number], MS * listed[at].fixed)
                        beyond.add(counts[number], MS * listed[at].each)
                program.at_least(Linear().add(makespan), begin, beyond)
    # (41) the makespan
    solution = program.solve(Linear().add(makespan), time_limit, gap)
    if solution.infeasible:
        return None
    bound = max(0.0, solution.bound / MS * (1 - MARGIN))
    if solution.values is None:
        return Allotment(taken=[], bound_seconds=bound)
    chosen_ways = [
        Taken(way=way, micro_batches=round(solution.values[count]))
        for way, count in zip(ways, counts)
        if solution.values[count] > 0.5
    ]
    return Allotment(taken=chosen_ways, bound_seconds=bound)


# --- steps of a round -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a device answers."""

    fixed_seconds: float
    """of a round in which it takes part, beside the steps"""
    step_seconds: float
    """infinite for one that cannot take any"""

    def answered(self, steps: int) -> float:
        """Seconds from when a round begins until its answer is there."""
        return self.fixed_seconds + steps * self.step_seconds if steps else 0.0


def shared_out(paces: Sequence[Pace], steps: int, unit: int = 1) -> list[int]:
    """How many of `steps` steps each device takes, in whole `unit`s, so that the last answer comes as soon as can be.

    Of devices that would end at the same time, earlier ones come first. `steps` is a multiple of `unit`, and some
    device has finite times.
    """
    taken = [0] * len(paces)
    ends = [
        (pace.answered(unit), at) for at, pace in enumerate(paces) if pace.fixed_seconds + pace.step_seconds < math.inf
    ]
    heapq.heapify(ends)
    for _ in range(steps // unit):
        _, at = ends[0]
        taken[at] += unit
        heapq.heapreplace(ends, (paces[at].answered(taken[at] + unit), at))
    return taken


def makespan_of(paces: Sequence[Pace], taken: Sequence[int]) -> float:
    """Seconds until the last answer is there."""
    return max(pace.answered(steps) for pace, steps in zip(paces, taken))


def shared_by_weight(weights: Sequence[float], units: int) -> list[int]:
    """Whole shares of `units` in proportion to the weights: the largest remainders are rounded up, the first of
    equals.
    """
    whole = sum(weights)
    exact = [units * weight / whole for weight in weights]
    shares = [math.floor(one) for one in exact]
    order = sorted(range(len(weights)), key=lambda at: (shares[at] - exact[at], at))
    for at in order[: units - sum(shares)]:
        shares[at] += 1
    return shares


# --- the order of services --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to serve a device, in seconds."""

    head: float
    """from when the round begins until the device is ready"""
    service: float
    tail: float
    """from when it has been served until its answer has arrived"""

    @property
    def alone(self) -> float:
        """Until its answer has arrived, where it waits for nobody."""
        return self.head + self.service + self.tail


@dataclass(frozen=True, kw_only=True)
class Served:
    """One device as it is served."""

    device: int
    way: int
    begin: float
    end: float
    answered: float


@dataclass(frozen=True, kw_only=True)
class ServiceOrder:
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


def best_order(ways: Sequence[Sequence[Way]], time_limit: float) -> ServiceOrder:
    """The order, and a way for each device, with which the last answer comes first, as found within `time_limit`
    seconds.

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
    return ServiceOrder(served=known, bound=min(bound, max(one.answered for one in known)))


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
