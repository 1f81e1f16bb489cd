"""A plan as the page shows it: what `Plan` holds, folded to what a person looks at."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from planner.explain import explain, tensor_bytes
from planner.graph import STATES, layer_graph
from planner.html import LARGEST, SLICES, describe, facts, series_of
from planner.kinds import buckets, feasible, in_use, kinds_of
from planner.schema import Plan
from planner.summary import plan_summary
from planner.svg import timeline_svg

Row = dict[str, Any]
NODES = 400
"""layers drawn; further ones are in the table alone"""
CHANGES = 2000
"""tensors listed in a difference"""


def plan_view(plan: Plan) -> Row:
    """JSON for the page; bytes, seconds."""
    view: Row = {
        "plan": plan.fingerprint,
        "title": f"{plan.policy} at {plan.budget_bytes} bytes",
        "model": plan.model.name,
        "about": describe(plan),
        "summary": plan_summary(plan),
        "sentences": explain(plan),
        "runnable": plan.model.kind == "decoder",
    }
    if not feasible(plan) or plan.train is None:
        return view
    shown = buckets(plan.timeline, SLICES)
    peak = max((bucket.point for bucket in shown), key=in_use)
    return view | {
        "facts": facts(plan),
        "timeline": {
            "svg": timeline_svg(plan, shown, "timeline"),
            "series": series_of(plan, shown),
            "kinds": [{"name": kind.name, "label": kind.label} for kind in kinds_of(b.point for b in shown)],
        },
        "peak": {
            "text": plan.train.peak.text,
            "instruction": plan.train.peak.instruction,
            "bytes": peak.bytes,
            "parts": [
                {"name": kind.name, "label": kind.label, "bytes": peak.by_kind[kind.name]}
                for kind in kinds_of([peak])
                if peak.by_kind.get(kind.name)
            ],
            "tensors": sorted(plan.train.peak.tensors.items(), key=lambda item: -item[1])[:LARGEST],
        },
        "layers": _layers(plan),
        "edges": _edges(plan),
        "channels": channels(plan),
    }


def channels(plan: Plan) -> list[Row]:
    """How busy each is over the step: seconds at work and their share."""
    train = plan.train
    assert train is not None
    step = plan.step_seconds or 1.0
    device = plan.device
    rows = [
        ("compute", train.compute_seconds - train.recompute_seconds, None),
        ("recompute", train.recompute_seconds, None),
        ("unpack", train.unpack_seconds, None),
        ("waiting", train.stall_seconds, None),
        ("reading", train.read_bytes / device.read.bytes_per_second, train.read_bytes),
        ("writing", train.write_bytes / device.write.bytes_per_second, train.write_bytes),
    ]
    return [{"name": name, "seconds": seconds, "share": seconds / step, "bytes": size} for name, seconds, size in rows]


def owners(plan: Plan) -> dict[str, str]:
    """Tensor -> the layer that it is shown with: the first that names it."""
    found: dict[str, str] = {}
    programs = {program.name: program for program in plan.programs}
    for layer in plan.layers:
        for value in programs[layer.program].values:
            name = layer.bindings.get(value.name, f"{layer.name}/{value.name}")
            found.setdefault(name, layer.name)
            if value.kind == "trainable":
                for state in STATES:
                    found.setdefault(f"{state}:{name}", layer.name)
    return found


def _layers(plan: Plan) -> list[Row]:
    """Each layer with the bytes under each decision, activations and weights apart, and the seconds of its passes."""
    sizes, owner = tensor_bytes(plan), owners(plan)
    kinds = {tensor.name: tensor.kind for tensor in plan.tensors}
    decided: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for name, decision in plan.decisions.items():
        state = name.startswith(tuple(f"{state}:" for state in STATES))
        group = "states" if state else "weights" if kinds.get(name) == "weight" else "activations"
        decided[owner.get(name, "")][group][decision] += sizes.get(name, 0)
    graph = layer_graph(plan)
    return [
        {
            "name": name,
            "program": layer.program,
            "forward_seconds": graph.nodes[name]["forward_seconds"],
            "backward_seconds": graph.nodes[name]["backward_seconds"],
            "decisions": {group: dict(counts) for group, counts in decided[name].items()},
        }
        for layer in plan.layers
        for name in [layer.name]
    ]


def _edges(plan: Plan) -> list[Row]:
    drawn = {layer.name for layer in plan.layers[:NODES]}
    return [
        {"from": source, "to": target, "bytes": size}
        for source, target, size in list[tuple[str, str, int]](layer_graph(plan).edges(data="bytes"))
        if source in drawn and target in drawn
    ]


def difference(one: Plan, other: Plan) -> Row:
    """What `other` does otherwise: figures side by side, and each tensor whose decision is another, largest first."""
    sizes = tensor_bytes(one) | tensor_bytes(other)
    owner = owners(one) | owners(other)
    absent = "–"
    changed: list[Row] = [
        {
            "tensor": name,
            "layer": owner.get(name, ""),
            "bytes": sizes.get(name, 0),
            "before": one.decisions.get(name, absent),
            "after": other.decisions.get(name, absent),
        }
        for name in dict.fromkeys([*one.decisions, *other.decisions])
        if one.decisions.get(name) != other.decisions.get(name)
    ]
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in changed:
        total = totals[row["before"], row["after"]]
        total[0] += 1
        total[1] += row["bytes"]
    return {
        "plans": [plan_summary(one), plan_summary(other)],
        "totals": [
            {"before": before, "after": after, "tensors": count, "bytes": size}
            for (before, after), (count, size) in sorted(totals.items(), key=lambda item: -item[1][1])
        ],
        "changes": sorted(changed, key=lambda row: -row["bytes"])[:CHANGES],
        "left_out": max(0, len(changed) - CHANGES),
    }
