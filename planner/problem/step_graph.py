"""Flattens a profile into one graph: every operator of the step in execution order, every storage with its producers
and consumers.

Forward runs the layers in order, backward in reverse. Storages are the profile's global tensors and each layer's
private values, which are called ``layer/value``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.planner.schema import Plan
from tightfit.profiles.schema import OPTIMIZER_STATES, Layer, Profile, Program, Tensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.kernels.optimizer import FACTORED, state_shape

ALIGNMENT = 64
"""arena offsets are multiples of this many bytes"""
PACKED_ALIGNMENT = 4096
"""offsets of packed weights, which are read with O_DIRECT, and of other tensors that are to lie on pages are multiples
of this
"""
STATES = (*dict.fromkeys(state for states in OPTIMIZER_STATES.values() for state in states), "grad_sum")
"""optimizer states of a trainable ``p`` are called ``adam_m:p`` and the like after its optimizer's own and, where an
update takes several steps or gradients are clipped, ``grad_sum:p``
"""
FLOAT_BYTES = 4
"""size of an element of a state"""
SUM = "grad_sum:"
"""prefix of the names of sums of gradients, the last of the states"""
STATE_PREFIXES = tuple(f"{state}:" for state in STATES)


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """`size` bytes rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


@dataclass(frozen=True, kw_only=True)
class StepOperator:
    """One operator of one layer."""

    index: int
    layer: int
    operator: int
    """position in the layer's program"""
    phase: str
    target: str
    inputs: tuple[str, ...]
    """storages that must be resident; gathered inputs, read from the store, are left out"""
    outputs: tuple[str | None, ...]
    seconds: float
    workspace_bytes: int
    recomputable: bool


@dataclass(frozen=True, kw_only=True)
class StepTensor:
    """A tensor of the whole step."""

    name: str
    kind: str
    bytes: int
    layer: int | None
    """the layer a private value belongs to; None for global tensors"""
    producers: tuple[int, ...]
    consumers: tuple[int, ...]
    """step indices"""


@dataclass(frozen=True, kw_only=True)
class StepGraph:
    steps: tuple[StepOperator, ...]
    inference: tuple[StepOperator, ...]
    """operators that layers run in an evaluation instead of their forward, if they have such;
    numbered on after `steps`
    """
    storages: dict[str, StepTensor]
    layers: tuple[str, ...]
    names: tuple[dict[str, str], ...]
    """per layer: program value -> storage name"""


def step_graph(source: Profile | Plan) -> StepGraph:
    """The graph of a profile's or plan's step: forward in layer order, then backward in reverse.

    Raises InputError where the source contradicts itself: names given twice or missing, a value read before it is made.
    """
    programs = {program.name: program for program in source.programs}
    if len(programs) != len(source.programs):
        raise InputError("two programs share a name; every program of a profile needs its own")
    tensors = {tensor.name: tensor for tensor in source.tensors}
    _check_layers(source.layers, programs)
    names = tuple(_storage_names(layer, programs[layer.program]) for layer in source.layers)
    steps: list[StepOperator] = []
    count = 0
    for phase in ("forward", "backward", "inference"):
        if phase == "inference":
            count = len(steps)
        order = range(len(source.layers))
        for index in reversed(order) if phase == "backward" else order:
            layer = source.layers[index]
            for position, operator in enumerate(programs[layer.program].operators):
                if operator.phase != phase:
                    continue
                local = names[index]
                for value in [*operator.inputs, *filter(None, operator.outputs)]:
                    if value not in local:
                        raise InputError(
                            f"program {layer.program}, operator {position} ({operator.target}) names the value"
                            f" {value!r}, which the program does not declare; add it to `values`"
                        )
                steps.append(
                    StepOperator(
                        index=len(steps),
                        layer=index,
                        operator=position,
                        phase=phase,
                        target=operator.target,
                        inputs=tuple(local[v] for v in dict.fromkeys(operator.inputs) if v not in operator.gathers),
                        outputs=tuple(None if v is None else local[v] for v in operator.outputs),
                        seconds=operator.seconds,
                        workspace_bytes=operator.workspace_bytes,
                        recomputable=operator.recomputable,
                    )
                )
    steps, inference = steps[:count], steps[count:]
    return StepGraph(
        steps=tuple(steps),
        inference=tuple(inference),
        storages=_storages(source.layers, programs, tensors, names, steps),
        layers=tuple(layer.name for layer in source.layers),
        names=names,
    )


def state_count(optimizer: Mapping[str, Any]) -> int:
    """Number of optimizer states of each trainable, of a profile's or plan's `optimizer`."""
    return int(optimizer.get("state_tensors", 2))


def state_roles(optimizer: Mapping[str, Any]) -> tuple[str, ...]:
    """Which optimizer states each trainable has, of a profile's or plan's `optimizer`."""
    own = OPTIMIZER_STATES.get(optimizer.get("name", "adamw"), OPTIMIZER_STATES["adamw"])
    summed = optimizer.get("accumulate", 1) > 1 or optimizer.get("max_grad_norm") is not None
    return (*own, *STATES[-1:])[: state_count(optimizer)] if summed else own[: state_count(optimizer)]


def state_bytes(state: str, tensor: Tensor) -> int:
    """Bytes of the optimizer state `state` of a trainable."""
    return FLOAT_BYTES * math.prod(state_shape(state, tensor.shape)) if state == FACTORED else tensor.bytes


def state_names(trainable: str, roles: Iterable[str]) -> tuple[str, ...]:
    """Names of the optimizer states `roles` of a trainable."""
    return tuple(f"{role}:{trainable}" for role in roles)


def _check_layers(layers: Iterable[Layer], programs: dict[str, Program]) -> None:
    seen: set[str] = set()
    for layer in layers:
        if layer.program not in programs:
            raise InputError(f"layer {layer.name} names the program {layer.program!r}, which the profile lacks")
        if layer.name in seen:
            raise InputError(f"two layers are called {layer.name!r}; give every layer its own name")
        seen.add(layer.name)


def _storage_names(layer: Layer, program: Program) -> dict[str, str]:
    return {value.name: layer.bindings.get(value.name, f"{layer.name}/{value.name}") for value in program.values}


def _storages(
    layers: list[Layer],
    programs: dict[str, Program],
    tensors: dict[str, Tensor],
    names: tuple[dict[str, str], ...],
    steps: list[StepOperator],
) -> dict[str, StepTensor]:
    declared: dict[str, tuple[str, int, int | None]] = {
        tensor.name: (tensor.kind, tensor.bytes, None) for tensor in tensors.values()
    }
    for index, layer in enumerate(layers):
        for value in programs[layer.program].values:
            name = names[index][value.name]
            owner = None if value.name in layer.bindings else index
            declared.setdefault(name, (value.kind, value.bytes, owner))
    producers: dict[str, list[int]] = {name: [] for name in declared}
    consumers: dict[str, list[int]] = {name: [] for name in declared}
    for step in steps:
        for name in step.inputs:
            consumers[name].append(step.index)
        for output in step.outputs:
            if output is not None:
                producers[output].append(step.index)
    written: set[str] = set()
    for step in steps:
        for name in step.inputs:
            if declared[name][0] in {"activation", "gradient"} and name not in written:
                raise InputError(
                    f"layer {layers[step.layer].name}, operator {step.operator} ({step.target}) reads {name}"
                    " before any operator makes it; check the order of layers and operators"
                )
        written.update(filter(None, step.outputs))
    return {
        name: StepTensor(
            name=name,
            kind=kind,
            bytes=size,
            layer=owner,
            producers=tuple(producers[name]),
            consumers=tuple(consumers[name]),
        )
        for name, (kind, size, owner) in declared.items()
    }
