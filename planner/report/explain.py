"""Explains a plan in sentences: how long its step takes and what is proven of it, what becomes of its tensors, what
little memory costs, what sets the peak and what more memory is worth.

The terminal and pages show these sentences; a page shows those of `gist` first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tightfit.planner.problem.device_forward import message_bytes, sent_tensors
from tightfit.planner.report.explanation import (
    Clipping,
    DecidedTensors,
    Explanation,
    MarginalValue,
    OperatorUse,
    PeakAccount,
    Recomputation,
    Shortfall,
    Sort,
    account,
    has_phases,
)
from tightfit.planner.report.step_words import expected_words, rehearsal_words
from tightfit.planner.schema import MEZO, Plan
from tightfit.profiles.devices.words import words_of
from tightfit.profiles.measuring.marks import caution
from tightfit.profiles.schema import MOBILLM, NOT_COMPARED, OPTIMIZER_STATES
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_seconds, format_size, printable

LEAST_KIND_SHARE, MOST_KINDS = 0.01, 6
"""kinds of operators that are told: of so much of the step, and so many"""
LEAST_SHARE = 5e-4
"""what costs, or differs by, less than this share of the step's seconds is not mentioned"""


def explain(plan: Plan, explanation: Explanation | None = None, *, commands: bool = True) -> list[str]:
    """Sentences, one per line of output; `explanation` where more is known than the plan itself tells; `commands`:
    whether they name commands and options that tell more.

    Names of tensors and operators come from the user: control characters in them are escaped for the terminal.
    """
    record = account(plan) if explanation is None else explanation
    return gist(plan, record, commands=commands) + details(plan, record, commands=commands)


def gist(plan: Plan, explanation: Explanation, *, commands: bool = False) -> list[str]:
    """The sentences of `explain` for somebody who reads of the plan for the first time: what its step takes, what is
    proven, what becomes of its tensors, and what little memory costs. Of a plan that does not fit: all there is to say.
    """
    if plan.train is None:
        sentences = _without_schedule(plan, explanation.shortfall)
    else:
        sentences = [*_verdict(plan, commands), *_decisions(plan, explanation), _price(plan, explanation)]
    return [printable(sentence) for sentence in (*caution(plan.device), *sentences)]


def details(plan: Plan, explanation: Explanation, *, commands: bool = False) -> list[str]:
    """The other sentences of `explain`; none of a plan that does not fit."""
    if plan.train is None:
        return []
    sentences = [
        *_references(plan),
        *_clipping(plan, explanation.clipping),
        *_peak(plan, explanation.peak),
        *_recomputation(plan, explanation.recomputation),
        *_busy(plan, explanation),
        *_operators(explanation.operators),
        *_worth(plan, explanation.neighbours, commands),
    ]
    return [printable(sentence) for sentence in sentences]


def verdict(plan: Plan) -> list[str]:
    """The sentences with which `explain` begins: what to doubt, the step's time and peak, and what is proven of
    them.
    """
    return [printable(sentence) for sentence in (*caution(plan.device), *_verdict(plan, commands=True))]


def _verdict(plan: Plan, commands: bool) -> list[str]:
    return [
        _headline(plan),
        *_gradient(plan, commands),
        *_optimizer(plan),
        *_let_through(plan),
        *_comparison(plan),
        _proof(plan),
        *_rehearsal(plan),
    ]


def _rehearsal(plan: Plan) -> list[str]:
    """What carrying the plan out has shown, or that it was not; nothing of a bare graph, which cannot be carried
    out.
    """
    if plan.model.is_bare_graph:
        return []
    if plan.rehearsal is not None:
        return [rehearsal_words(plan)]
    where = "" if plan.device.measured else f", since it is for {plan.device.name}"
    return [f"not rehearsed{where}: its seconds and its peak are the model's"]


def _without_schedule(plan: Plan, shortfall: Shortfall | None) -> list[str]:
    rule = None if plan.policy == "solver" else plan.policy
    proven = plan.status == "infeasible"
    if rule is None:
        who, its = "no plan fits" if proven else "no plan was found that fits", "the"
    else:
        who, its = f"the rule {rule} {'does not fit' if proven else 'was not found to fit'}", "its"
    lines = [f"{who} {format_size(plan.budget_bytes)} for {words_of(plan.device, plan.model).whole}"]
    smallest = plan.minimum_budget_bytes if shortfall is None else shortfall.minimum_budget_bytes
    if smallest is not None:
        lines.append(f"{its} smallest feasible budget {_least_words(plan, smallest)}")
    if shortfall is None:
        reason = plan.minimum_budget_reason
        if reason and not has_phases(plan):
            reason = reason.replace(" (forward)", "", 1).replace(" (forward again)", " (run again)", 1)
        return [*lines, reason] if reason else lines
    lines[-1] += f", {format_size(shortfall.missing_bytes, round_up=True)} more"
    if not proven and plan.ended_by == "time limit":
        lines.append("a longer --time-limit may find a plan, or the proof that there is none")
    start = plan.device.floor.start_peak_bytes
    if plan.budget_bytes < start:
        lines.append(f"starting {words_of(plan.device).floor} alone reaches {format_size(start)}")
    lines += _peak(plan, shortfall.peak)
    if shortfall.remedies:
        changes = ", ".join(f"{remedy.change} up to {format_size(remedy.saves_bytes)}" for remedy in shortfall.remedies)
        lines.append(f"what would lower it: {changes}")
    return lines


def _least_words(plan: Plan, smallest: int) -> str:
    """Where the smallest budget lies: between what is proven and the smallest found."""
    found = f"{format_size(smallest, round_up=True)} ({smallest} bytes)"
    bound = plan.minimum_bound_bytes
    if bound is None or format_size(bound) in (format_size(smallest), format_size(smallest, round_up=True)):
        return f"is {found}"
    return f"lies between {format_size(bound)}, which is proven, and {found}, the smallest found"


def _headline(plan: Plan) -> str:
    spare = plan.budget_bytes - plan.peak_bytes
    return (
        f"one step takes {expected_words(plan)} and peaks at {format_size(plan.peak_bytes)} of"
        f" {format_size(plan.budget_bytes)} for {words_of(plan.device, plan.model).whole} ({format_size(spare)} spare)"
    )


def _gradient(plan: Plan, commands: bool) -> list[str]:
    """Which estimate of the gradient the steps follow, where it is not the exact one."""
    if plan.optimizer.get("name") == MOBILLM:
        return [_served(plan, commands)]
    if plan.optimizer.get("name") == MEZO:
        return ["two forwards and no backward: the gradient is estimated along one random direction per step"]
    if plan.cycle:
        turns = {layer for step in plan.steps for layer in step.skipped}
        trained = " / ".join(str(len(turns) - len(step.skipped)) for step in plan.steps)
        text = f"a cycle of {len(plan.steps)} steps: a backward through {trained} of {len(turns)} layers in turn, the"
        return [
            f"{text} gradient passes the others by; times are means over the cycle, what follows is its first step's"
        ]
    if plan.accumulate > 1:
        return [f"the gradients of {plan.accumulate} steps make one update"]
    return []


def _let_through(plan: Plan) -> list[str]:
    """What the module's forward changes in Python, and the steps leave out, since the user let it through."""
    names = plan.model.ignored_state
    return [f"let through: {', '.join(names)}, which forward changes in Python and a step does not"] if names else []


def _optimizer(plan: Plan) -> list[str]:
    """Which optimizer updates, where it is not AdamW."""
    name = plan.optimizer.get("name", "adamw")
    if name == "adamw" or name not in OPTIMIZER_STATES:
        return []
    if name == "adafactor":
        return ["updates by adafactor, which has a mean for each row and each column of a trained matrix"]
    count = len(OPTIMIZER_STATES[name])
    states = "no state" if not count else "one state" if count == 1 else f"{count} states"
    seconds = "their seconds are AdamW's as profiled, by the bytes that are touched"
    return [f"updates by {name}, which has {states} of each trained tensor; {seconds}"]


def _references(plan: Plan) -> list[str]:
    preference = plan.model.preference
    if preference is None or preference.loss != "dpo" or plan.evaluate is None:
        return []
    pairs = "pair" if plan.batch == 1 else f"{plan.batch} pairs"
    seconds = format_seconds(plan.evaluate.seconds)
    return [
        f"before the first step the adapter is off once for all answers' log-probabilities: {seconds} for each {pairs}"
    ]


def _clipping(plan: Plan, clipping: Clipping | None) -> list[str]:
    if clipping is None:
        return []
    on_disk_bytes = clipping.sum_bytes_on_disk
    where = f", {format_size(on_disk_bytes)} of them on {words_of(plan.device).elsewhere}" if on_disk_bytes else ""
    shared = f", shared by {plan.accumulate} steps" if plan.accumulate > 1 else ""
    sums = f"their sums take {format_size(clipping.sum_bytes)}{where}"
    adding = f"adding to them takes {format_seconds(clipping.adding_seconds)} of a step"
    update = (
        "the update of all that is trained, once the last gradient is known,"
        f" {format_seconds(clipping.update_seconds)}{shared}"
    )
    unclipped = f"updates right after each gradient take {format_seconds(clipping.unclipped_seconds)}"
    return [
        f"gradients are clipped to a norm of {clipping.max_grad_norm:g}: {sums}; {adding} and {update}; {unclipped}"
    ]


def _served(plan: Plan, commands: bool) -> str:
    """What a device of `mobillm` computes, what it sends, and what is trained where."""
    passing, bits = sent_tensors(plan)
    rounded = f", {bits} bits for a number," if bits else ""
    return (
        f"a forward of the frozen model and no backward: the outputs of {len(passing) - 1} of its blocks go to a"
        f" server{rounded} in a message of {format_size(message_bytes(plan))} per step, labels included, for which its"
        " time has no room; the result is a side network that the server trains, and no adapter"
        + (f": plan and run both with `tightfit fleet plan --kind {MOBILLM}`" if commands else "")
    )


def _comparison(plan: Plan) -> list[str]:
    """Which comparisons of a module with PyTorch were not made, or failed."""
    comparison, other = plan.model.compared or "", plan.model.other_evaluation
    lines = [f"gradients of the module: {comparison}"] if comparison.startswith(NOT_COMPARED) else []
    return [*lines, f"evaluations are refused: {other}"] if other else lines


ENDS = {
    "gap": "as near as was asked for",
    "stalled": "where the search gained no more",
    "time limit": "where the time limit ended the search",
    "interrupt": "where the search was interrupted",
}


def percent_within(gap: float) -> str:
    """A gap as a percentage with two decimals, rounded up, so that "within" it is true."""
    return f"{math.ceil(1e4 * gap - 1e-6) / 1e4:.2%}"


def nearness(plan: Plan, kind: str = "kind") -> str:
    """What is proven of a solver's plan, and what ended its search; `kind` is what the plans it is compared with are
    called by.
    """
    if plan.status == "optimal":
        return f"proven optimal among plans of its {kind}"
    text = f"within {percent_within(plan.gap)} of the best plan of its {kind}"
    end = ENDS.get(plan.ended_by or "")
    return f"{text}, {end}" if end else text


def _proof(plan: Plan) -> str:
    caveat = "" if plan.device.measured else "; times are estimated, not measured"
    if plan.policy in {"solver", MOBILLM}:
        kind = nearness(plan)
    else:
        kind = f"a fixed rule ({plan.policy}): searching could save at most {percent_within(plan.gap)} of its time"
    any_schedule = percent_within(plan.any_schedule_gap)
    return f"{kind}; no schedule whatever at this budget could save more than {any_schedule} of its time{caveat}"


def _decisions(plan: Plan, explanation: Explanation) -> list[str]:
    """What became of weights, activations and optimizer states: a sentence for each sort that the plan has."""
    disk = words_of(plan.device).elsewhere
    phases = has_phases(plan)
    sorts: dict[Sort, tuple[str, dict[str, str]]] = {
        "weights": (
            "frozen weights",
            {
                "unpacked": "unpacked in memory all the time",
                "packed": "packed in memory and unpacked for each use",
                "streamed": f"read from {disk} for each use",
            },
        ),
        "activations": (
            "activations saved for the backward" if phases else "outputs that are needed again later",
            {
                "kept": "kept in memory",
                "recomputed": "given up and computed again",
                "offloaded": f"written to {disk} and fetched",
            },
        ),
        "states": ("optimizer's states", {"kept": "kept in memory", "offloaded": f"on {disk} between updates"}),
    }
    decided = {(group.sort, group.decision): group for group in explanation.decisions}
    if ("trained", "offloaded") in decided:
        words = {"kept": "kept in memory", "offloaded": f"on {disk} while no operator reads them"}
        sorts["trained"] = "values of what is trained", words
    sentences = []
    for sort, (name, words) in sorts.items():
        groups = [(decided[sort, decision], text) for decision, text in words.items() if (sort, decision) in decided]
        if groups:
            sentences.append(
                f"{name}: {', '.join(f'{group.tensors} {text} ({_sizes(group)})' for group, text in groups)}"
            )
    return sentences


def _sizes(group: DecidedTensors) -> str:
    packed = 0 < group.packed_bytes < group.bytes
    return format_size(group.bytes) + (f", {format_size(group.packed_bytes)} packed" if packed else "")


def _price(plan: Plan, explanation: Explanation) -> str:
    """What the step's time goes into for lack of memory."""
    train, step = plan.train, plan.step_seconds
    assert train is not None
    shares = {
        "computing again what was given up": train.recompute_seconds,
        "unpacking weights": train.unpack_seconds,
        f"waiting for {words_of(plan.device).elsewhere}": explanation.waiting_seconds,
    }
    parts = [
        f"{seconds / step:.1%} ({format_seconds(seconds)}) {name}"
        for name, seconds in shares.items()
        if step and seconds / step >= LEAST_SHARE
    ]
    if not parts:
        return "no time is lost to the lack of memory"
    return f"what little memory costs of a step by the model: {', '.join(parts)}"


def _peak(plan: Plan, peak: PeakAccount | None) -> list[str]:
    if peak is None:
        return []
    phase = {"train": "in training ", "evaluate": "in evaluation ", "update": "in the update "}[peak.phase]
    phase = phase if has_phases(plan) else ""
    largest = ", ".join(f"{tensor} {format_size(size)}" for tensor, size in list(peak.tensors.items())[:3])
    sizes = {
        "floor": peak.floor_bytes,
        "tensors": peak.tensor_bytes,
        "workspace": peak.workspace_bytes,
        "schedule": peak.schedule_bytes,
    }
    parts = ", ".join(f"{format_size(size)} {name}" for name, size in sizes.items() if size)
    if peak.start_bytes:
        start = (
            f"the peak is set by the start of {words_of(plan.device).floor}: it reaches {format_size(peak.bytes)},"
            f" {format_size(peak.start_bytes)} more than all that follows"
        )
        subject = f"the peak after that, {format_size(peak.bytes - peak.start_bytes)},"
    else:
        start, subject = None, "the peak"
    text = f"{subject} is set {phase}by {peak.text} (instruction {peak.instruction}): {parts}; largest there: {largest}"
    return [text] if start is None else [start, text]


def _recomputation(plan: Plan, recomputation: Recomputation | None) -> list[str]:
    if recomputation is None or not recomputation.operators:
        return []
    example: dict[str, str] = {}
    for layer in plan.layers:
        example.setdefault(layer.program, layer.name)
    dearest = ", ".join(
        f"{group.operator} {format_seconds(group.seconds)} ({group.runs} {'run' if group.runs == 1 else 'runs'} in"
        f" {_layers(group.layers, example[group.program])})"
        for group in recomputation.operators[:3]
    )
    text = (
        f"making {_made(recomputation)} again costs {format_seconds(recomputation.seconds)}, {recomputation.share:.1%}"
        f" of the step; dearest: {dearest}"
    )
    if not recomputation.layers_twice:
        return [text]
    inputs = recomputation.layer_inputs
    twice = (
        f"{recomputation.layers_twice} layers go forward twice, in runs, the second time just before their backward:"
        f" {inputs} layer {'input is' if inputs == 1 else 'inputs are'} made again instead of kept or moved"
    )
    return [text, twice]


def _made(recomputation: Recomputation) -> str:
    """The bytes are those of the tensors: how much lower the peak is depends on which of them would
    lie there together.
    """
    if recomputation.tensors == 1:
        return f"1 activation of {format_size(recomputation.bytes)}"
    return f"{recomputation.tensors} activations of {format_size(recomputation.bytes)} together"


def _layers(count: int, example: str) -> str:
    return example if count == 1 else f"{count} layers like {example}"


def _busy(plan: Plan, explanation: Explanation) -> list[str]:
    if plan.model.is_bare_graph and not any(use.bytes for use in explanation.channels):
        return []
    where = words_of(plan.device).elsewhere
    words = {"compute": "computing", "read": f"reading from {where}", "write": f"writing to {where}"}
    parts = [
        f"{words[use.name]} {use.share:.1%}" + (f" ({format_size(use.bytes)})" if use.name != "compute" else "")
        for use in explanation.channels
        if use.name == "compute" or use.bytes
    ]
    return [f"busy in the step: {', '.join(parts)}"]


def _operators(uses: Sequence[OperatorUse]) -> list[str]:
    """Where the cores' time goes, by kind of operator, as far as it is worth a word; nothing where no operator counts
    FLOPs.
    """
    if not any(use.flops for use in uses):
        return []
    parts = []
    for use in [use for use in uses if use.share >= LEAST_KIND_SHARE][:MOST_KINDS]:
        rate = f", {use.flops / use.seconds / 1e9:.0f} GFLOP/s" if use.flops and use.seconds else ""
        parts.append(f"{use.operator} {use.share:.1%} ({format_seconds(use.seconds)}{rate})")
    return [f"of the step, by kind of operator: {', '.join(parts)}"] if parts else []


def _worth(plan: Plan, neighbours: list[MarginalValue], commands: bool) -> list[str]:
    sentences = []
    for neighbour in sorted(neighbours, key=lambda neighbour: -neighbour.change_bytes):
        size = format_size(abs(neighbour.change_bytes))
        change = f"{size} {'more' if neighbour.change_bytes > 0 else 'less'}"
        if neighbour.budget_bytes >= 0:
            change += f" ({format_size(neighbour.budget_bytes)})"
        priced = "unknown" if neighbour.status else "no plan fits"
        if neighbour.price_seconds is not None:
            priced = _difference(neighbour.price_seconds, plan)
        floor = plan.device.floor.held_bytes
        if neighbour.budget_bytes <= floor:
            floor_alone = f", {words_of(plan.device).floor} alone take {format_size(floor)}" if floor else ""
            sentences.append(f"{change}: no plan fits{floor_alone}")
        elif neighbour.status is None:
            planning = f" ({spelled('what_if', True)} plans it)" if commands else ""
            sentences.append(f"{change}: {priced}, by the model's prices{planning}")
        elif neighbour.step_seconds is None:
            sentences.append(f"{change}: no plan fits, as planning again shows")
        else:
            planned = _difference(neighbour.step_seconds - plan.step_seconds, plan)
            sentences.append(
                f"{change}: {format_seconds(neighbour.step_seconds)} per step, {planned}, as planning again shows (by"
                f" the model's prices: {priced})"
            )
    return sentences


def _difference(seconds: float, plan: Plan) -> str:
    share = abs(seconds) / plan.step_seconds if plan.step_seconds else 0.0
    if share < LEAST_SHARE:
        return "no difference"
    return f"{format_seconds(abs(seconds))} ({share:.1%}) {'slower' if seconds > 0 else 'faster'}"
