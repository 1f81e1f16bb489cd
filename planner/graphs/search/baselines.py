"""Fixed rules for training graphs: what of the forward stays, and the rest made again once, just before the backward first
reads it. The baselines, and where the search starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, pruned
from tightfit.runtime.common.errors import InputError


def keep_all(dag: Dag) -> frozenset[Rerun]:
    """Nothing is made again; every output stays until its last reader."""
    return frozenset()


def checkpoint_layers(dag: Dag) -> frozenset[Rerun]:
    """Only the outputs that all later forward operators depend on stay: the articulation points of the forward graph."""
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
    """Names of the rules that mean something for a graph: without a backward there is nothing to keep for."""
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
    """Forward outputs in `kept` stay; the backward makes each of the others again at most once, with what that takes."""
    there = {*kept, *(i for i in range(dag.forward) if not dag.recomputable[i] or dag.keep[i])}
    there.update(dag.inputs[-1] if dag.sink else ())
    # What the forward's last operator reads or makes is there when the backward begins.
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
    """Forward operators whose output is the only one that later forward operators read from before."""
    points = []
    open_until = -1
    for i in range(dag.forward - 1):
        if open_until <= i:
            points.append(i)
        open_until = max([open_until, *(user for user in dag.users[i] if user < dag.forward)])
    return points
