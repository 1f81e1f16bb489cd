"""The two bounds of a plan: for its class, and for any schedule at all; moments chosen, programs solved (`windows`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from planner.graphs.dag import Dag
from planner.graphs.schedule import Rerun, memory, runs
from planner.graphs.windows import solve_windows

ANY_MOMENTS = (1, 2, 4, 8)
CLASS_MOMENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SHORT = (0.95, 0.8, 0.5)
"""a moment may lie where the best schedule known holds this share of the budget"""
WHOLE = 4
"""choices of moments tried with whole numbers"""
REFINEMENTS = 6
ADDED = 4
"""moments added by a refinement"""


@dataclass(frozen=True, kw_only=True)
class Bound:
    seconds: float
    timely: bool = True
    """whether the clock left room for all that was to be tried, and every program was solved to its end"""
    reruns: tuple[frozenset[Rerun], ...] = ()
    """schedules but for the memory between moments: where a search may start"""


def path_pivots(dag: Dag, count: int) -> list[int]:
    """At most `count` operators on the path of the graph that takes in most of the memory's rise and fall."""
    length = [0.0] * len(dag)
    source = [-1] * len(dag)
    for i in range(len(dag)):
        for j in dag.inputs[i]:
            if length[j] + 1.0 > length[i]:
                length[i], source[i] = length[j] + 1.0, j
    at = max(range(len(dag)), key=length.__getitem__)
    path = []
    while at >= 0:
        path.append(at)
        at = source[at]
    path.reverse()
    return sorted({path[(2 * k + 1) * len(path) // (2 * count)] for k in range(count)})


def any_schedule_bound(dag: Dag, budget_bytes: int, *, seconds: float) -> Bound:
    """Seconds that no schedule at all undercuts, whatever it reorders; infinity where none fits."""
    deadline = time.monotonic() + seconds
    best = dag.once_seconds
    timely = True
    for count in ANY_MOMENTS:
        left = deadline - time.monotonic()
        if left <= 0:
            timely = False
            break
        pivots = path_pivots(dag, count)
        answer = solve_windows(dag, budget_bytes, pivots, any_order=True, seconds=left)
        timely = timely and answer.solved
        best = max(best, answer.bound_seconds)
        if len(pivots) < count or best == float("inf"):
            break
    return Bound(seconds=best, timely=timely)


def class_bound(
    dag: Dag, budget_bytes: int, reruns: frozenset[Rerun], *, deadline: float, whole: bool, enough: float = float("inf")
) -> Bound:
    """Seconds that no schedule of the class undercuts.

    `reruns` is the best schedule known: moments are laid where its memory is short. `whole`: the choices of moments that
    give the best linear programs are then solved in whole numbers. The work ends early where the bound is `enough`.
    """
    best = dag.once_seconds
    tried: dict[tuple[int, ...], float] = {}
    timely = True
    for pivots in _moments(dag, budget_bytes, reruns):
        left = deadline - time.monotonic()
        if pivots in tried or best >= enough:
            continue
        if left <= 0:
            timely = False
            break
        answer = solve_windows(dag, budget_bytes, pivots, any_order=False, seconds=left)
        timely = timely and answer.solved
        tried[pivots] = answer.bound_seconds
        best = max(best, tried[pivots])
    starts: list[frozenset[Rerun]] = []
    waiting = sorted(tried, key=lambda pivots: (-tried[pivots], len(pivots), pivots))[: WHOLE if whole else 0]
    most = len(waiting) + REFINEMENTS
    solved: dict[tuple[int, ...], float] = {}
    while waiting and best < enough and len(solved) < most:
        left = deadline - time.monotonic()
        if left <= 0:
            timely = False
            break
        pivots = waiting.pop(0)
        share = left / (1 + min(len(waiting) + REFINEMENTS // 2, most - len(solved) - 1))
        answer = solve_windows(dag, budget_bytes, pivots, any_order=False, seconds=share, whole=True)
        solved[pivots] = answer.bound_seconds
        timely = timely and answer.solved
        best = max(best, answer.bound_seconds)
        if answer.reruns is not None:
            starts.append(answer.reruns)
            if not waiting:
                finer = _refined(dag, budget_bytes, pivots, answer.reruns)
                waiting.extend([finer] if finer not in solved else [])
    return Bound(seconds=best, timely=timely, reruns=tuple(starts))


def _refined(dag: Dag, budget_bytes: int, pivots: tuple[int, ...], reruns: frozenset[Rerun]) -> tuple[int, ...]:
    """The moments and a few more, where a schedule that fits at all of them is furthest over the budget."""
    sequence = runs(dag, reruns)
    over: dict[int, int] = {}
    for (stage, _), size in zip(sequence, memory(dag, sequence)):
        if size > budget_bytes and stage not in pivots:
            over[stage] = max(over.get(stage, 0), size)
    added: list[int] = []
    for stage in sorted(over, key=lambda stage: (-over[stage], stage)):
        if len(added) < ADDED and all(abs(stage - other) > 2 for other in added):
            added.append(stage)
    return tuple(sorted({*pivots, *added}))


def _moments(dag: Dag, budget_bytes: int, reruns: frozenset[Rerun]) -> Iterator[tuple[int, ...]]:
    """Choices of moments, evenly laid among those where the schedule's memory is short."""
    sequence = runs(dag, reruns)
    held = memory(dag, sequence)
    first = {operator: size for (stage, operator), size in zip(sequence, held) if stage == operator}
    for share in SHORT:
        short = [operator for operator, size in sorted(first.items()) if size >= share * budget_bytes]
        for count in CLASS_MOMENTS if short else ():
            yield tuple(sorted({short[(2 * k + 1) * len(short) // (2 * count)] for k in range(count)}))
