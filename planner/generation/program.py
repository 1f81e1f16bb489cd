"""The integer program that chooses what stays in memory, (50) to (55) of docs/formulation.md."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.planner.generation.choice import Choice, ChoiceProblem
from tightfit.planner.generation.problem import PAGE
from tightfit.planner.solvers.lp import Linear, LinearProgram
from tightfit.runtime.engine.generation.job import DEPTH, PACKED, STATES, STREAMED, UNPACKED

GAP = 1e-6
MILLISECONDS = 1e3


def choose_each(problems: Sequence[ChoiceProblem]) -> list[Choice | None]:
    """The best choice of each problem."""
    return [choose(problem) for problem in problems]


def choose(problem: ChoiceProblem) -> Choice | None:
    """The states of pieces with which an answer takes least; None if nothing fits into the room."""
    program = LinearProgram()
    counts = [
        {state: program.variable(0, kind.number if kind.costs(state).allowed else 0, whole=True) for state in STATES}
        for kind in problem.kinds
    ]
    staging = program.variable(0)  # pages of the room of one streamed piece
    held = Linear(0.0).add(staging, float(DEPTH))
    token, group = Linear(MILLISECONDS * problem.token_seconds), Linear(0.0)
    read_all, read_body = Linear(), Linear()
    fixed = MILLISECONDS * problem.group_seconds
    for kind, own in zip(problem.kinds, counts, strict=True):
        program.exactly(Linear.sum(own.values()), float(kind.number))  # (50)
        some = program.choice()
        program.at_least(Linear().add(some, float(kind.number)), Linear().add(own[STREAMED]))  # (51)
        pages = kind.packed_bytes / PAGE
        program.at_least(Linear().add(staging), Linear().add(some, pages))
        for state in (PACKED, UNPACKED):
            held.add(own[state], kind.costs(state).held_bytes / PAGE)
        reading = MILLISECONDS * kind.packed_bytes * problem.read_seconds_per_byte
        read_all.add(own[STREAMED], reading)
        if not kind.head:
            read_body.add(own[STREAMED], reading)
        for state in STATES:
            token.add(own[state], MILLISECONDS * kind.costs(state).token_seconds)
            if not kind.head:
                group.add(own[state], MILLISECONDS * kind.costs(state).group_seconds)
    program.at_least(Linear(problem.room_bytes / PAGE), held)  # (52)
    token_time, pass_time = program.variable(0), program.variable(0)
    for time, work, read in ((token_time, token, read_all), (pass_time, group, read_body)):
        program.at_least(Linear().add(time), work)  # (53)
        program.at_least(Linear().add(time), read)  # (54)
    goal = (
        Linear(fixed * problem.groups)
        .add(token_time, float(problem.token_passes))
        .add(pass_time, float(problem.prompt_passes))
    )  # (55)
    solution = program.solve(goal, gap=GAP)
    if solution.values is None:
        return None
    values = solution.values
    chosen = [{state: round(values[number]) for state, number in own.items()} for own in counts]
    return Choice(counts=chosen, seconds=solution.objective / MILLISECONDS)
