"""A plan in three sentences for somebody who reads of it for the first time: what happens to the tensors, what limits,
and how near to the best it is. `tightfit.planner.report.explain` tells more, to those who plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tightfit.planner.report.costs import Cost, CostLedger
from tightfit.planner.report.explain import percent_within
from tightfit.planner.report.explanation import Explanation, Shortfall, account, has_phases
from tightfit.planner.report.memory_categories import peak_parts
from tightfit.planner.schema import Plan
from tightfit.profiles.devices.words import words_of
from tightfit.profiles.schema import MOBILLM
from tightfit.runtime.common.units import format_seconds, format_size, printable

LEAST = 0.005
"""shares of the step's seconds below this are not mentioned"""


def plain_words(plan: Plan, explanation: Explanation | None = None) -> list[str]:
    """Three sentences; of a plan that does not fit, what is missing, what is in the way, and what would help."""
    figures = account(plan) if explanation is None else explanation
    if plan.train is None:
        sentences = _missing(plan, figures.shortfall)
    else:
        sentences = [_tensors(plan), _limits(plan, figures), _nearness(plan)]
    return [printable(sentence) for sentence in sentences]


def _tensors(plan: Plan) -> str:
    """What happens to weights, activations and the optimizer's states."""
    ledger = CostLedger(plan)
    costs = ledger.costs()
    disk = words_of(plan.device).elsewhere
    until = "until the backward needs them" if has_phases(plan) else "until they are needed again"
    activations = _shares(
        _bytes_by_decision(costs, "activation", "gradient"),
        {
            "kept": f"stay in memory {until}",
            "recomputed": "are given up and computed again",
            "offloaded": f"wait on {disk} meanwhile",
        },
    )
    weights = _shares(
        _bytes_by_decision(costs, "weight"),
        {
            "unpacked": "stay in memory as they are computed with",
            "packed": "stay in memory packed and are unpacked for each use",
            "streamed": f"are read from {disk} for each use",
        },
        stored=_stored_by_decision(ledger, costs),
    )
    states = _shares(
        _bytes_by_decision(costs, "optimizer"),
        {"kept": "stay in memory", "offloaded": f"wait on {disk} between updates"},
    )
    parts = [
        f"{name}{what}"
        for name, what in (
            ("the frozen weights", weights),
            ("the activations" if has_phases(plan) else "the outputs", activations),
            ("the optimizer's states", states),
        )
        if what
    ]
    text = "; ".join(parts) or "everything stays in memory, and nothing is computed twice"
    return f"{text[0].upper()}{text[1:]}."


def _bytes_by_decision(costs: Mapping[str, Cost], *kinds: str) -> Counter[str]:
    sums: Counter[str] = Counter()
    for cost in costs.values():
        if cost.decision is not None and cost.kind in kinds:
            sums[cost.decision] += cost.bytes
    return sums


def _stored_by_decision(ledger: CostLedger, costs: Mapping[str, Cost]) -> Counter[str]:
    """Bytes of weights as they lie in memory packed and on disk, which is less than what they take unpacked."""
    sums: Counter[str] = Counter()
    for name, cost in costs.items():
        if cost.decision in {"packed", "streamed"} and cost.kind == "weight":
            sums[cost.decision] += ledger.index.tensors[name].packed_bytes
    return sums


def _shares(sums: Mapping[str, int], words: Mapping[str, str], stored: Mapping[str, int] | None = None) -> str:
    """What becomes of some tensors, the largest share first: ` (40 MiB) stay in memory`, or `: 40 MiB stay in memory
    and 3 MiB ...`.

    Of those that are `stored` in fewer bytes, this is said too.
    """
    shares = sorted(((size, decision) for decision, size in sums.items() if decision in words), reverse=True)
    less = {name: size for name, size in (stored or {}).items() if 0 < size < sums.get(name, 0)}
    if len(shares) == 1:
        size, decision = shares[0]
        packed = f", {format_size(less[decision])} packed" if decision in less else ""
        return f" ({format_size(size)}{packed}) {words[decision]}"
    named = [
        format_size(size) + (f" ({format_size(less[decision])} packed) " if decision in less else " ") + words[decision]
        for size, decision in shares
    ]
    return f": {', '.join(named[:-1])} and {named[-1]}" if named else ""


def _limits(plan: Plan, explanation: Explanation) -> str:
    """What fills the memory at its fullest moment, and what the step's time goes into."""
    train, step = plan.train, plan.step_seconds
    assert train is not None
    parts = sorted(peak_parts(plan), key=lambda part: -part[1])
    largest = " and ".join(f"{kind.label} ({format_size(size)})" for kind, size in parts[:2])
    text = (
        f"Memory is fullest at {format_size(plan.peak_bytes)} of {format_size(plan.budget_bytes)}, most of it {largest}"
    )
    shares = {
        "into computing again what was given up": train.recompute_seconds,
        "into unpacking weights": train.unpack_seconds,
        f"into waiting for {words_of(plan.device).elsewhere}": explanation.waiting_seconds,
    }
    notable = [f"{seconds / step:.1%} {name}" for name, seconds in shares.items() if step and seconds / step >= LEAST]
    if not notable:
        return f"{text}; no time is lost to the lack of memory."
    return (
        f"{text}; of the {format_seconds(step)} of a step by the model, {_listed(notable)}: that is what little memory"
        " costs."
    )


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _nearness(plan: Plan) -> str:
    """How near to the best the plan is."""
    any_schedule = f"no schedule whatever could save more than {percent_within(plan.any_schedule_gap)} of its time"
    if plan.policy not in {"solver", MOBILLM}:
        return (
            f"It follows a fixed rule, {plan.policy}: searching could save at most {percent_within(plan.gap)} of its"
            " time."
        )
    if plan.status == "optimal":
        return f"It is proven to be the fastest plan of its kind in this memory; {any_schedule}."
    return (
        f"A faster plan of its kind could save at most {percent_within(plan.gap)} of its time, which is proven;"
        f" {any_schedule}."
    )


def _missing(plan: Plan, shortfall: Shortfall | None) -> list[str]:
    who = "It" if plan.policy == "solver" else f"The rule {plan.policy}"
    smallest = plan.minimum_budget_bytes if shortfall is None else shortfall.minimum_budget_bytes
    if smallest is None:
        return [f"{who} does not fit {format_size(plan.budget_bytes)}."]
    missing = format_size(smallest - plan.budget_bytes, round_up=True)
    found = " found so far" if plan.deterministic is False else ""
    enough = f"the smallest budget that is enough{found} is {format_size(smallest, round_up=True)}, {missing} more"
    sentences = [f"{who} does not fit {format_size(plan.budget_bytes)}: {enough}."]
    if shortfall is None:
        return sentences
    peak = shortfall.peak
    sizes = {
        words_of(plan.device).floor: peak.floor_bytes + peak.start_bytes,
        "tensors that lie in memory together": peak.tensor_bytes,
        "what the operator needs beside them": peak.workspace_bytes,
    }
    filled = _listed([f"{name} {format_size(size)}" for name, size in sizes.items() if size])
    sentences.append(f"Even then memory is full at {peak.text}: {filled}.")
    if shortfall.remedies:
        changes = _listed([f"{one.change} (up to {format_size(one.saves_bytes)})" for one in shortfall.remedies])
        sentences.append(f"What would lower it: {changes}.")
    return sentences
