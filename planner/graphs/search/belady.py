"""Belady's rule for re-runs: one sweep that, where the budget is full, evicts the output whose next reader is farthest
ahead.

The evicted output is recomputed just before that reader (Belady 1966). Only outputs that few operators can recompute
are evicted, so that no chain runs from its start for each of its readers. The sweep takes time in proportion to the
graph's size, however small the budget.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heappop, heappush

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, pruned

FEW = 8
"""an output may be evicted only if at most so many operators recompute it, from nothing or from outputs that cannot be
recomputed
"""
MOST = 2
"""re-runs per operator beyond which the sweep gives up: such a schedule is no use as a starting point"""


def belady_schedule(dag: Dag, budget: int) -> frozenset[Rerun]:
    """The re-runs of a sweep. It keeps to `budget` bytes as far as outputs can be evicted, so the schedule may exceed
    it; no re-runs at all where the sweep would take more than `MOST` per operator.
    """
    sources = _sources(dag)
    # Outputs that cannot be recomputed stay to the end if an evictable output is recomputed from them.
    stays = {i for found in sources if found for j in found for i in dag.again_inputs[j] if not dag.recomputable[i]}
    live: set[int] = set()
    held = dag.fixed_bytes
    farthest: list[tuple[int, int]] = []
    result: set[Rerun] = set()
    for stage in range(len(dag)):
        inputs = dag.inputs[stage]
        missing: set[int] = set()
        waiting = [i for i in inputs if i not in live]
        while waiting:
            i = waiting.pop()
            if i not in missing:
                missing.add(i)
                waiting.extend(j for j in dag.again_inputs[i] if j not in live)
        result.update((stage, i) for i in missing)
        if len(result) > MOST * len(dag):
            return frozenset()
        # The inputs of what is recomputed in this stage must not be evicted before.
        needed = {*inputs, *(j for i in missing for j in dag.again_inputs[i])}
        room = budget - dag.bytes[stage] - dag.workspace[stage] - sum(dag.bytes[i] for i in missing)
        spared = []
        while held > room and farthest:
            entry = heappop(farthest)
            user, i = -entry[0], entry[1]
            if i not in live or user != _reader(dag, i, stage - 1):
                continue
            if i in needed:
                spared.append(entry)
                continue
            live.discard(i)
            held -= dag.bytes[i]
        for entry in spared:
            heappush(farthest, entry)
        for i in (*missing, stage):
            live.add(i)
            held += dag.bytes[i]
        for i in {*needed, *missing, stage}:
            reader = _reader(dag, i, stage)
            if reader < len(dag):
                if sources[i] is not None and dag.bytes[i]:
                    heappush(farthest, (-reader, i))
            elif i not in stays and not dag.keep[i]:
                live.discard(i)
                held -= dag.bytes[i]
    return pruned(dag, result)


def _reader(dag: Dag, operator: int, stage: int) -> int:
    """The first operator after `stage` that reads the output, the number of operators where there is none."""
    users = dag.users[operator]
    after = bisect_right(users, stage)
    return users[after] if after < len(users) else len(dag)


def _sources(dag: Dag) -> list[frozenset[int] | None]:
    """For each operator the operators that must run, at most, to recompute its output; None where that are more than
    `FEW` or the operator may not run again.
    """
    result: list[frozenset[int] | None] = []
    for i in range(len(dag)):
        found: set[int] | None = {i} if dag.recomputable[i] else None
        for j in dag.again_inputs[i]:
            if found is None or not dag.recomputable[j]:
                continue
            below = result[j]
            found = None if below is None or len(found | below) > FEW else found | below
        result.append(None if found is None else frozenset(found))
    return result
