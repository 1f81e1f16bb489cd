"""Condenses a plan, or the difference of two, to what the service's page and written pages show. Bytes and seconds."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from tightfit.planner.problem.step_graph import step_graph
from tightfit.planner.problem.tensor_index import TensorIndex
from tightfit.planner.report.costs import CostLedger
from tightfit.planner.report.diff import diff, grouped
from tightfit.planner.report.explain import details, gist
from tightfit.planner.report.explanation import SORTS, Explanation, account, peak_text
from tightfit.planner.report.summary import describe, plan_summary
from tightfit.planner.schema import Plan

Row = dict[str, Any]
CHANGES = 2000
"""tensors listed in a difference"""
LARGEST = 12
"""tensors listed at the peak"""


def plan_view(plan: Plan, identity: str, stored: Row | None = None, *, not_runnable: str | None = None) -> Row:
    """`identity` is the stored plan's, `stored` the explanation that was made with it, where there is one. What a plan
    without a schedule lacks is None or empty.
    """
    record = account(plan)
    if stored is not None:
        planned = Explanation.model_validate(stored)
        record = record.model_copy(update={"neighbours": planned.neighbours, "shortfall": planned.shortfall})
    shown = plan.fits and bool(plan.timeline)
    return {
        "plan": identity,
        "model": plan.model.name,
        "about": describe(plan),
        "summary": plan_summary(plan),
        **words_view(plan, record),
        "not_runnable": not_runnable,
        "fits": shown,
        "peak": peak_view(plan, record) if shown else None,
        "layers": _layers(plan) if shown else [],
        "channels": _channels(plan, record) if shown else [],
    }


def words_view(plan: Plan, record: Explanation) -> dict[str, list[str]]:
    """A plan in sentences: those for everybody first, with a capital and a full stop, and those with more figures."""
    return {
        "gist": [f"{sentence[0].upper()}{sentence[1:]}." for sentence in gist(plan, record)],
        "details": details(plan, record),
    }


def peak_view(plan: Plan, record: Explanation) -> Row:
    """The fullest moment of the training step, the instruction that sets it, and the largest tensors there."""
    assert plan.train is not None
    return {
        "text": peak_text(plan, plan.train),
        "instruction": plan.train.peak.instruction,
        "bytes": sum(part.bytes for part in record.memory),
        "parts": [part.model_dump() for part in record.memory],
        "tensors": sorted(plan.train.peak.tensors.items(), key=lambda item: -item[1])[:LARGEST],
    }


def _channels(plan: Plan, explanation: Explanation) -> list[Row]:
    """How busy each is over the step: seconds at work, their share, bytes moved; and what the cores wait."""
    share = explanation.waiting_seconds / plan.step_seconds if plan.step_seconds else 0.0
    waiting = {"name": "waiting", "seconds": explanation.waiting_seconds, "share": share, "bytes": 0}
    return [*(use.model_dump() for use in explanation.channels), waiting]


def _layers(plan: Plan) -> list[Row]:
    """Each layer, or operator of a bare graph, with the bytes under each decision, activations, weights and optimizer
    states apart; seconds of its passes.
    """
    if plan.model.is_bare_graph:
        return _operators(plan)
    layer_of = TensorIndex(plan).owners()
    decided: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for name, cost in CostLedger(plan).costs().items():
        if cost.decision is not None and cost.kind in SORTS:
            decided[layer_of.get(name, "")][SORTS[cost.kind]][cost.decision] += cost.bytes
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    graph = step_graph(plan)
    for step in graph.steps:
        seconds[graph.layers[step.layer], step.phase] += step.seconds
    return [
        {
            "name": layer.name,
            "program": layer.program,
            "forward_seconds": seconds[layer.name, "forward"],
            "backward_seconds": seconds[layer.name, "backward"],
            "decisions": {group: dict(counts) for group, counts in decided[layer.name].items()},
        }
        for layer in plan.layers
    ]


def _operators(plan: Plan) -> list[Row]:
    """A bare graph's operators, as layers of their own."""
    costs = CostLedger(plan).costs()
    rows = []
    for operator in plan.programs[0].operators:
        (name,) = (output for output in operator.outputs if output is not None)
        cost = costs.get(name)
        decided = {} if cost is None or cost.decision is None else {"activations": {cost.decision: cost.bytes}}
        rows.append(
            {
                "name": name,
                "program": operator.target,
                "forward_seconds": operator.seconds if operator.phase == "forward" else 0.0,
                "backward_seconds": operator.seconds if operator.phase == "backward" else 0.0,
                "decisions": decided,
            }
        )
    return rows


def difference(before: Plan, after: Plan) -> Row:
    """What `after` does otherwise: figures side by side, changes by sort, and tensor by tensor, largest first."""
    changes = diff(before, after)
    layer_of = TensorIndex(before).owners()
    return {
        "plans": [plan_summary(before), plan_summary(after)],
        "groups": [asdict(group) for group in grouped(changes)],
        "changes": [asdict(change) | {"layer": layer_of.get(change.name, "")} for change in changes[:CHANGES]],
        "left_out": max(0, len(changes) - CHANGES),
    }
