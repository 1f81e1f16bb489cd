"""Fixed rules for training graphs: which forward outputs stay; the others are recomputed just before the backward needs
them.

Each is recomputed at most once. The rules serve as baselines and as starting points of the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, pruned
from tightfit.runtime.common.errors import InputError


def keep_all(dag: Dag) -> frozenset[Rerun]:
    """Nothing is recomputed; every output stays until its last reader."""
    return frozenset()


def checkpoint_layers(dag: Dag) -> frozenset[Rerun]:
    """Only outputs at the forward graph's articulation points stay: later operators depend on earlier ones through
    these alone.
    """
    return remade(dag, _articulation_points(dag))


def checkpoint_sqrt(dag: Dag) -> frozenset[Rerun]:
    """Every √n-th forward output stays, in the graph's order (Chen et al. 2016)."""
    stride = max(1, round(math.sqrt(dag.forward)))
    return remade(dag, range(stride - 1, dag.forward, stride))


RULES: dict[str, Callable[[Dag], frozenset[Rerun]]] = {
    "keep-all": keep_all,
    "checkpoint-layers": checkpoint_layers,
    "checkpoint-sqrt": checkpoint_sqrt,
}


def rules_for(dag: Dag) -> tuple[str, ...]:
    """Names of the rules that mean something for a graph; without a backward that is ``keep-all`` alone."""
    return tuple(RULES) if dag.forward < len(dag) else ("keep-all",)


def rule_reruns(dag: Dag, policy: str) -> frozenset[Rerun]:
    """The re-runs of a rule. Raises InputError for a name that is no rule of such a graph."""
    names = rules_for(dag)
    if policy not in names:
        why = "" if policy not in RULES else ", which needs operators marked forward and backward"
        raise InputError(
            f"no policy for this graph is called {policy!r}{why}; choose one of solver, {', '.join(names)}"
        )
    return RULES[policy](dag)


def remade(dag: Dag, kept: Iterable[int]) -> frozenset[Rerun]:
    """The re-runs when the forward outputs in `kept` stay and the backward recomputes each other one that it needs,
    once, with the forward outputs that this in turn needs.
    """
    there = {*kept, *(i for i in range(dag.forward) if not dag.recomputable[i] or dag.keep[i])}
    there.update(dag.inputs[-1] if dag.sink else ())
    # The inputs and the output of the forward's last operator are still there when the backward begins.
    there.update(dag.inputs[dag.forward - 1], (dag.forward - 1,))
    reruns: set[Rerun] = set()
    for stage in range(dag.forward, len(dag)):
        waiting = [stage]
        while waiting:
            for i in dag.inputs[waiting.pop()]:
                if i < dag.forward and i not in there:
                    there.add(i)
                    reruns.add((stage, i))
                    waiting.append(i)
    return pruned(dag, reruns)


def _articulation_points(dag: Dag) -> list[int]:
    """Forward operators i whose output is the only one of operators up to i that later forward operators read."""
    points = []
    open_until = -1
    for i in range(dag.forward - 1):
        if open_until <= i:
            points.append(i)
        open_until = max([open_until, *(user for user in dag.users[i] if user < dag.forward)])
    return points
