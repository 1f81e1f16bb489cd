"""The integer program that allots micro-batches: who takes part, who is first and last, how many each computes, shelves.

It knows a member by its ways to take part: a role in the chain, shelves, and for a range of micro-batches the seconds
of one. Those seconds are lower bounds, or those of plans; its rows are the lower bounds of `exchange_bounds`. So with
lower bounds its optimum is one on the makespan of every allotment, order, choice of shelves and plans. Numbers in
brackets are those of the blocks in docs/formulation.md.
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
