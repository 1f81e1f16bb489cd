"""The integer program that allots micro-batches: who takes part, who is first and last, how many each computes, shelves.

It knows a member by its ways to take part: a role in the chain, shelves, and for a range of micro-batches the seconds
of one. Those seconds are lower bounds, or those of plans; its rows are the lower bounds of `exchange_bounds`. So with
lower bounds its optimum is one on the makespan of every allotment, order, choice of shelves and plans.

The numbers are those of docs/formulation.md. Variables: T, the makespan; C, when the last has computed; for each way w
of member i whether it is taken, y_w, and its micro-batches, k_w.

    (41) minimise T
    (36) at most one way per member; exactly one first, exactly one last; between only if there is one beside, at most one
    the k_w add up to all micro-batches, and least_w y_w <= k_w <= most_w y_w
    (37) C >= sum over i's ways of seconds_w k_w                             for every i
    (38) T >= C + sum over i's ways of (fixed y_w + each k_w)                for every common row
    (39) T >= sum over i's ways of ((seconds_w + each) k_w + fixed y_w)      for every own row
    (40) T >= C + sum of turning_w y_w over the ways to be last + sum of back_w y_w over all others
    T >= sum over the ways to be first of seconds_w k_w + sum of turned_w y_w over those to be last
         + sum of (there_w y_w + each k_w + back_w y_w) over all others
    the last two also for the ways to be beside the last, where `others` are those to be first or between
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.planner.fleet.exchange_bounds import Role, Row, Terms
from tightfit.planner.fleet.schema import Shelf
from tightfit.planner.solvers.highs import MARGIN
from tightfit.planner.solvers.lp import Linear, LinearProgram

MS = 1e3
"""the program counts in milliseconds, so that its numbers are neither huge nor tiny"""


@dataclass(frozen=True, kw_only=True)
class Way:
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

    way: Way
    micro_batches: int


@dataclass(frozen=True, kw_only=True)
class Allotment:
    taken: list[Taken]
    """none where the time limit came first"""
    bound_seconds: float
    """no allotment among the ways has a lower makespan, as the program states it"""


def allot(ways: Sequence[Way], micro_batches: int, *, time_limit: float, gap: float) -> Allotment | None:
    """The best allotment to a chain of at least two, to a relative `gap`; None: the ways do not allow any."""
    program = LinearProgram()
    makespan, computed = program.variable(), program.variable()
    taken = [program.choice() for _ in ways]
    counts = [program.variable(0.0, float(way.most), whole=True) for way in ways]
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
        program.at_least(Linear(1.0), Linear.sum(taken[number] for number in own))
        computing = Linear()
        for number in own:
            computing.add(counts[number], MS * ways[number].seconds)
        program.at_least(Linear().add(computed), computing)
        for kind, begin in (("common", Linear().add(computed)), ("own", computing)):
            rows: list[list[Row]] = [getattr(ways[number].terms, kind) for number in own]
            for at in range(max(map(len, rows))):
                beyond = Linear()
                for number, listed in zip(own, rows):
                    if at < len(listed):
                        beyond.add(taken[number], MS * listed[at].fixed)
                        beyond.add(counts[number], MS * listed[at].each)
                program.at_least(Linear().add(makespan), begin, beyond)
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
