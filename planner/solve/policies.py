"""Fixed rules that yield a plan without a solver: the baselines.

They differ from the solver's plans in the decisions only; lowering, prefetching, arena and simulation are the same.
Those in `POLICIES` follow the exact gradient, as the solver's plans do, and give the same results to the bit. Those in
`APPROXIMATE` follow another one, take another time for it, and learn differently. `MOBILLM` trains a side network on a
server instead: its step is the forward that a device computes for it, and the solver decides about that forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.clipping import refuse_clipping
from tightfit.planner.problem.device_forward import check_side
from tightfit.planner.problem.gradients import (
    PartialStep,
    lcsb_cycle,
    refuse_accumulation,
    refuse_statistics,
    refuse_tables,
    two_forwards,
)
from tightfit.planner.problem.layer_types import LayeredStep, LayerType, WeightMode
from tightfit.planner.schedule.layer_schedule import Column, Decision, measure
from tightfit.planner.schedule.multi_layer_recompute import Segments, sqrt_segments
from tightfit.planner.schedule.realize import CyclePart
from tightfit.planner.search_options import check_policy
from tightfit.profiles.schema import MOBILLM, Profile
from tightfit.runtime.common.errors import InputError


def keep_all(kind: LayerType, *, last: bool) -> Decision:
    """Plain training: everything the backward reads stays, weights stay unpacked, optimizer states stay."""
    return _decision(kind, _read_by_backward(kind), _unpacked)


def checkpoint_layers(kind: LayerType, *, last: bool) -> Decision:
    """Activation checkpointing per layer: only layer inputs stay, the layer's forward runs again in its backward.

    The last layer's backward follows its forward at once, so it keeps what it has.
    """
    return _decision(kind, _read_by_backward(kind) if last else frozenset(), _unpacked)


def mebp(kind: LayerType, *, last: bool) -> Decision:
    """Memory-efficient backpropagation (Song and Tang, 2025): checkpoints per layer, and each weight is read and
    unpacked just before its use in forward and again in backward.
    """
    return _decision(kind, _read_by_backward(kind) if last else frozenset(), _streamed)


def mesp(kind: LayerType, *, last: bool) -> Decision:
    """Memory-efficient structured backpropagation (Park et al., arXiv 2602.13069), by its abstract: layer inputs are
    checkpointed, the backward is exact, and h = x A is made again in it instead of being stored.

    What is taken as its rule: of a layer only the input outlives the forward. In its backward each tensor that the next
    operator reads, h among them, is made again just before its first reader and dropped after its last one, and no
    unpacked weight waits for its use: its 4-bit bytes are read once per window and unpacked at each use.
    """
    return _decision(kind, _read_by_backward(kind) if last else frozenset(), _unpacked_at_each_use)


def smallest(kind: LayerType, *, last: bool) -> Decision:
    """Everything on disk or made again; what the search starts from, no policy of its own."""
    decision = fewest(kind, last=last)
    weights = tuple(
        (name, mode if kind.weights[name].repeated else _streamed(kind.weights[name].modes))
        for name, mode in decision.weights
    )
    return replace(decision, weights=weights)


def fewest(kind: LayerType, *, last: bool) -> Decision:
    """As `smallest`, with each weight unpacked anew for every use, so that it holds fewer bytes and takes longer."""
    decision = _decision(kind, frozenset(), _least, trained=_least)
    away = {value for value in decision.keep if value in kind.offloadable and value in kind.owned}
    states = frozenset(update.trainable for update in kind.updates if update.states)
    return Decision(keep=decision.keep - away, offload=frozenset(away), weights=decision.weights, states=states)


def all_streamed(kind: LayerType, *, last: bool) -> Decision:
    """Every activation kept, every weight streamed; no policy of its own, but near the fastest plan of many budgets."""
    return _decision(kind, keep_all(kind, last=last).keep, _streamed)


Rule = Callable[..., Decision]
POLICIES: dict[str, Rule] = {
    "keep-all": keep_all,
    "checkpoint-layers": checkpoint_layers,
    "checkpoint-sqrt": keep_all,
    "mebp": mebp,
    "mesp": mesp,
}
SEGMENTED: dict[str, Callable[[LayeredStep], Segments]] = {"checkpoint-sqrt": sqrt_segments}
"""Rules under which runs of layers go forward twice. checkpoint-sqrt (Chen et al., arXiv 1604.06174): of about √n
layers the input stays; before their backward they run again and keep what it reads. The last ones, whose backward
follows their forward, keep what they have.
"""
APPROXIMATE: dict[str, Callable[[Profile], tuple[PartialStep, ...]]] = {
    "mezo": lambda profile: (two_forwards(profile),),
    "lcsb": lcsb_cycle,
}
"""mezo: two forwards, no backward. lcsb: the backward of a fourth of the layers in turn. Decisions are those of
`mebp`.
"""


def approximate_of(profile: Profile) -> tuple[str, ...]:
    """Names of the rules whose results are not those of the exact gradient and that can be planned for a profile: those
    in `APPROXIMATE`, which move trained tensors after every step, and `MOBILLM`.
    """
    refused = refused_of(profile)
    names = (*APPROXIMATE, MOBILLM)
    return () if profile.model.is_bare_graph else tuple(policy for policy in names if policy not in refused)


def refused_of(profile: Profile) -> dict[str, str]:
    """Rule that does not follow the exact gradient -> why it cannot be planned for a profile."""
    reasons = {}
    for policy in (*APPROXIMATE, MOBILLM):
        try:
            if policy == MOBILLM:
                check_side(profile)
                refuse_clipping(profile, policy)
            else:
                refuse_accumulation(profile, policy)
                refuse_statistics(profile, policy)
                refuse_clipping(profile, policy)
                if policy == "lcsb":
                    refuse_tables(profile, policy)
        except InputError as error:
            reasons[policy] = str(error)
    return reasons


def policy_parts(problem: LayeredStep, policy: str) -> tuple[CyclePart, ...]:
    """The policy's steps, in turn, with its decision for every layer.

    Raises InputError for a name that is no policy, and where the policy means nothing for the model.
    """
    check_policy(policy)
    if policy in APPROXIMATE:
        refuse_clipping(problem.profile, policy)
        return tuple(_cycle_part(step) for step in APPROXIMATE[policy](problem.profile))
    return (rule_part(problem, policy),)


def rule_part(problem: LayeredStep, policy: str) -> CyclePart:
    """The step of a policy that follows the exact gradient."""
    segments = SEGMENTED[policy](problem) if policy in SEGMENTED else ()
    return CyclePart(problem=problem, columns=rule_columns(problem, POLICIES[policy]), segments=segments)


def _cycle_part(step: PartialStep) -> CyclePart:
    problem = layered(step.profile)
    sizes = {tensor.name: tensor.bytes for tensor in step.profile.tensors}
    # The noise of one trainable at a time.
    noise = max((sizes[name] for name in step.perturbed), default=0)
    return CyclePart(
        problem=replace(problem, workspace_bytes=max(problem.workspace_bytes, noise)),
        columns=rule_columns(problem, mebp),
        skipped=step.skipped,
        passages=step.passages,
        perturbed=step.perturbed,
    )


def rule_columns(problem: LayeredStep, rule: Rule) -> tuple[Column, ...]:
    count = len(problem.layer_type)
    measured: dict[tuple[int, bool], Column] = {}
    for layer, kind in enumerate(problem.layer_type):
        key = kind, layer == count - 1
        if key not in measured:
            measured[key] = measure(problem.types[kind], rule(problem.types[kind], last=key[1]))
    return tuple(measured[kind, layer == count - 1] for layer, kind in enumerate(problem.layer_type))


def _decision(
    kind: LayerType,
    keep: frozenset[str],
    mode: Callable[[tuple[WeightMode, ...]], WeightMode],
    *,
    trained: Callable[[tuple[WeightMode, ...]], WeightMode] | None = None,
) -> Decision:
    """The decision that keeps `keep`, with weights in the `mode` that is chosen from theirs. What is trained stays in
    memory, as optimizer states do, unless `trained` chooses otherwise.
    """
    of_trained = trained or _unpacked
    return Decision(
        keep=keep | kind.lasting,
        offload=frozenset(),
        weights=tuple(
            (name, (of_trained if weight.trained else mode)(weight.modes)) for name, weight in kind.weights.items()
        ),
        states=frozenset(),
    )


def _read_by_backward(kind: LayerType) -> frozenset[str]:
    read = {value for op in kind.backward for value in op.inputs}
    return frozenset(value for value in kind.candidates if value in read)


def _unpacked(modes: tuple[WeightMode, ...]) -> WeightMode:
    return modes[-1]


def _least(modes: tuple[WeightMode, ...]) -> WeightMode:
    """That of the fewest bytes."""
    return modes[0]


def _streamed(modes: tuple[WeightMode, ...]) -> WeightMode:
    """Read in each window, unpacked once there."""
    streamed = WeightMode("disk", "disk", "unpacked")
    return streamed if streamed in modes else modes[0]


def _unpacked_at_each_use(modes: tuple[WeightMode, ...]) -> WeightMode:
    """Read in each window, unpacked at each use there."""
    unpacked_per_use = WeightMode("disk", "disk", "packed")
    return unpacked_per_use if unpacked_per_use in modes else modes[0]
