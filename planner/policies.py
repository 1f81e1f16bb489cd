"""Fixed rules that yield a plan without a solver: the baselines.

They differ from the solver's plans in the decisions only; emission, read-ahead, arena and simulation are the same.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.layers import Layered, LayerType, Mode
from planner.windows import Column, Decision, measure
from profiles.errors import InputError
from profiles.schema import Profile


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


def smallest(kind: LayerType, *, last: bool) -> Decision:
    """Everything on disk or made again; what the search starts from, no policy of its own."""
    decision = _decision(kind, frozenset(), _streamed)
    away = {value for value in decision.keep if value in kind.offloadable and value in kind.owned}
    states = frozenset(update.trainable for update in kind.updates if update.states)
    return Decision(keep=decision.keep - away, offload=frozenset(away), weights=decision.weights, states=states)


Rule = Callable[..., Decision]
POLICIES: dict[str, Rule] = {"keep-all": keep_all, "checkpoint-layers": checkpoint_layers, "mebp": mebp}


def policies_of(profile: Profile) -> tuple[str, ...]:
    """Names of the fixed rules that mean something for a profile."""
    if profile.model.kind != "graph":
        return tuple(POLICIES)
    from planner.graphs.dag import dag_of
    from planner.graphs.rules import rules_for

    return rules_for(dag_of(profile))


def policy_columns(problem: Layered, policy: str) -> tuple[Column, ...]:
    """The policy's decision for every layer. Raises InputError for a name that is no policy."""
    rule = POLICIES.get(policy)
    if rule is None:
        raise InputError(f"no policy is called {policy!r}; choose one of solver, {', '.join(POLICIES)}")
    return rule_columns(problem, rule)


def rule_columns(problem: Layered, rule: Rule) -> tuple[Column, ...]:
    count = len(problem.layer_type)
    measured: dict[tuple[int, bool], Column] = {}
    for layer, kind in enumerate(problem.layer_type):
        key = kind, layer == count - 1
        if key not in measured:
            measured[key] = measure(problem.types[kind], rule(problem.types[kind], last=key[1]))
    return tuple(measured[kind, layer == count - 1] for layer, kind in enumerate(problem.layer_type))


def _decision(kind: LayerType, keep: frozenset[str], mode: Callable[[tuple[Mode, ...]], Mode]) -> Decision:
    producer = kind.producer
    must = {value for value in kind.candidates if value in kind.owned or not producer[value].recomputable}
    return Decision(
        keep=keep | must,
        offload=frozenset(),
        weights=tuple((name, mode(weight.modes)) for name, weight in kind.weights.items()),
        states=frozenset(),
    )


def _read_by_backward(kind: LayerType) -> frozenset[str]:
    read = {value for op in kind.backward for value in op.inputs}
    return frozenset(value for value in kind.candidates if value in read)


def _unpacked(modes: tuple[Mode, ...]) -> Mode:
    return modes[-1]


def _streamed(modes: tuple[Mode, ...]) -> Mode:
    """Read in each window, unpacked once there."""
    once = Mode("disk", "disk", "unpacked")
    return once if once in modes else modes[0]
