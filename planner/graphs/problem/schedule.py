"""A schedule as the set of its re-runs: which operators run again before which first run.

Order, lifetimes, peak and seconds follow from that set. Stage t is the runs that end with the first run of operator t.
Within a stage runs follow the graph's order, and an output is live from its run to the last run that reads it before it
is made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tightfit.planner.graphs.problem.dag import Dag

Rerun = tuple[int, int]
"""(stage, operator): the operator runs again in the stage, before the stage's own first run"""


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """One output from one run to its last reader; positions in the sequence of runs, both included."""

    operator: int
    start: int
    end: int


def runs(dag: Dag, reruns: Iterable[Rerun]) -> list[Rerun]:
    """All runs in order as (stage, operator); a first run has stage == operator."""
    return sorted({*reruns, *((i, i) for i in range(len(dag)))})


def lifetimes(dag: Dag, sequence: list[Rerun]) -> Iterator[Lifetime]:
    """Every lifetime of a sequence of runs. Raises AssertionError where a run reads an output that
    no earlier run made.
    """
    start = [-1] * len(dag)
    end = [-1] * len(dag)
    for position, (stage, operator) in enumerate(sequence):
        for i in dag.inputs[operator] if stage == operator else dag.again_inputs[operator]:
            assert start[i] >= 0
            end[i] = position
        if start[operator] >= 0:
            yield Lifetime(operator=operator, start=start[operator], end=end[operator])
        start[operator] = end[operator] = position
    for operator in range(len(dag)):
        last = len(sequence) - 1 if dag.keep[operator] else end[operator]
        yield Lifetime(operator=operator, start=start[operator], end=last)


def memory(dag: Dag, sequence: list[Rerun]) -> list[int]:
    """Bytes that are live during each run, workspace and fixed bytes included."""
    change = [0] * (len(sequence) + 1)
    for life in lifetimes(dag, sequence):
        change[life.start] += dag.bytes[life.operator]
        change[life.end + 1] -= dag.bytes[life.operator]
    result = []
    held = dag.fixed_bytes
    for (stage, operator), delta in zip(sequence, change):
        held += delta
        result.append(held + (dag.workspace if stage == operator else dag.again_workspace)[operator])
    return result


def peak_bytes(dag: Dag, reruns: Iterable[Rerun]) -> int:
    """The most bytes live at once, workspace and fixed bytes included."""
    return max(memory(dag, runs(dag, reruns)))


def seconds(dag: Dag, reruns: Iterable[Rerun]) -> float:
    """Seconds of all runs, one after the other. They are summed in schedule order, so equal sets give equal floats."""
    return sum((dag.seconds if stage == i else dag.again_seconds)[i] for stage, i in runs(dag, reruns))


def pruned(dag: Dag, reruns: Iterable[Rerun]) -> frozenset[Rerun]:
    """The re-runs that are needed: those whose output a later run reads before it is made again, or must be there at
    the end.
    """
    wanted = {operator for operator in range(len(dag)) if dag.keep[operator]}
    needed = []
    for stage, operator in reversed(runs(dag, reruns)):
        if stage != operator and operator not in wanted:
            continue
        if stage != operator:
            needed.append((stage, operator))
        wanted.discard(operator)
        wanted.update(dag.inputs[operator] if stage == operator else dag.again_inputs[operator])
    return frozenset(needed)
