"""A plan in plain words: what is kept, made again, streamed and moved, what sets the peak, how near the optimum it is."""

from __future__ import annotations

from collections import defaultdict

from planner.graph import STATES
from planner.schema import Phase, Plan
from profiles.units import format_size

STATE_PREFIXES = tuple(f"{state}:" for state in STATES)


def explain(plan: Plan) -> list[str]:
    """Sentences, one per line of output."""
    if plan.status == "infeasible" or plan.train is None:
        return _infeasible(plan)
    return [
        _headline(plan),
        _proof(plan),
        *_activations(plan),
        *_weights(plan),
        *_states(plan),
        _time(plan, plan.train),
        _peak(plan, plan.train),
    ]


def _infeasible(plan: Plan) -> list[str]:
    lines = [f"no plan fits {format_size(plan.budget_bytes)} for the whole process"]
    if plan.minimum_budget_bytes is not None:
        lines.append(f"the smallest budget that can hold is {format_size(plan.minimum_budget_bytes, round_up=True)}")
    if plan.minimum_budget_reason:
        lines.append(plan.minimum_budget_reason)
    return lines


def _headline(plan: Plan) -> str:
    spare = plan.budget_bytes - plan.peak_bytes
    return (
        f"one step takes {plan.step_seconds:.3f} s and peaks at {format_size(plan.peak_bytes)} of"
        f" {format_size(plan.budget_bytes)} for the whole process, Python and PyTorch included ({format_size(spare)} spare)"
    )


def _proof(plan: Plan) -> str:
    if plan.policy != "solver":
        who = f"a fixed rule ({plan.policy}), no search"
    else:
        who = {
            "optimal": "proven optimal",
            "feasible": "not proven optimal",
            "fallback": "found without the solver, which ran out of time",
        }.get(plan.status, plan.status)
    estimated = "" if plan.device.measured else "; times are estimated, not measured"
    return (
        f"{who}: at most {plan.gap:.2%} slower than the best plan of its kind,"
        f" at most {plan.any_schedule_gap:.2%} slower than any schedule at this budget{estimated}"
    )


def _sizes(plan: Plan) -> dict[str, int]:
    sizes = {tensor.name: tensor.bytes for tensor in plan.tensors}
    programs = {program.name: program for program in plan.programs}
    for layer in plan.layers:
        for value in programs[layer.program].values:
            sizes.setdefault(layer.bindings.get(value.name, f"{layer.name}/{value.name}"), value.bytes)
    for name in [tensor.name for tensor in plan.tensors if tensor.kind == "trainable"]:
        for prefix in STATE_PREFIXES:
            sizes[prefix + name] = sizes[name]
    return sizes


def _totals(plan: Plan, kinds: set[str], *, states: bool = False) -> dict[str, tuple[int, int]]:
    """Decision -> (tensors, bytes) over tensors of these kinds."""
    kind_of = {tensor.name: tensor.kind for tensor in plan.tensors}
    sizes = _sizes(plan)
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, decision in plan.decisions.items():
        state = name.startswith(STATE_PREFIXES)
        kind = "optimizer" if state else kind_of.get(name, "activation")
        if kind in kinds and state == states:
            totals[decision][0] += 1
            totals[decision][1] += sizes.get(name, 0)
    return {decision: (count, size) for decision, (count, size) in totals.items()}


def _phrase(totals: dict[str, tuple[int, int]], words: dict[str, str]) -> str:
    parts = [
        f"{totals[decision][0]} {text} ({format_size(totals[decision][1])})"
        for decision, text in words.items()
        if decision in totals
    ]
    return ", ".join(parts)


def _activations(plan: Plan) -> list[str]:
    totals = _totals(plan, {"activation", "gradient"})
    words = {
        "kept": "kept in memory",
        "recomputed": "made again in the backward",
        "offloaded": "written to disk and fetched",
    }
    phrase = _phrase(totals, words)
    return [f"activations saved for the backward: {phrase}"] if phrase else []


def _weights(plan: Plan) -> list[str]:
    totals = _totals(plan, {"weight"})
    words = {
        "unpacked": "unpacked in memory all the time",
        "packed": "in memory as 4-bit and unpacked before each use",
        "streamed": "read from disk in every step",
    }
    phrase = _phrase(totals, words)
    return [f"frozen weights: {phrase}"] if phrase else []


def _states(plan: Plan) -> list[str]:
    totals = _totals(plan, {"optimizer"}, states=True)
    phrase = _phrase(totals, {"kept": "kept in memory", "offloaded": "on disk between updates"})
    return [f"optimizer states: {phrase}"] if phrase else []


def _time(plan: Plan, train: Phase) -> str:
    device = plan.device
    moved = train.read_bytes + train.write_bytes
    busy = train.read_bytes / device.read.bytes_per_second + train.write_bytes / device.write.bytes_per_second
    share = busy / train.seconds if train.seconds else 0.0
    return (
        f"of the step, {train.recompute_seconds:.3f} s make activations again, {train.unpack_seconds:.3f} s unpack weights,"
        f" {train.stall_seconds:.3f} s wait for the disk; the disk moves {format_size(moved)} and is busy {share:.0%} of the time"
    )


def _peak(plan: Plan, train: Phase) -> str:
    phase, name = train, "training"
    if plan.evaluate is not None and plan.evaluate.peak_bytes > train.peak_bytes:
        phase, name = plan.evaluate, "evaluation"
    largest = ", ".join(f"{tensor} {format_size(size)}" for tensor, size in list(phase.peak.tensors.items())[:3])
    return f"the {name} peak is reached at {phase.peak.text}; largest there: {largest}"
