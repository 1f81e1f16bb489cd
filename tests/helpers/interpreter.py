"""Interprets a traced step plainly: every operator called in its functional form, nothing freed, no plan.

It defines what a trace means: tests compare it with autograd, and the runtime with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tightfit.profiles.schema import Layer, Operator, Program, Value
from tightfit.runtime.engine.cpu.operators import OPERATORS

READING_SHAPES = {
    f"aten.{name}_backward.default" for name in ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d")
}


def run_step(layers: list[Layer], programs: Mapping[str, Program], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run one forward and backward; returns every tensor made, by global name."""
    env = dict(tensors)
    for phase, order in (("forward", layers), ("backward", list(reversed(layers)))):
        for layer in order:
            operators = programs[layer.program].operators
            _run(layer, programs, env, [operator for operator in operators if operator.phase == phase])
    return env


def run_inference(
    layers: list[Layer], programs: Mapping[str, Program], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run one forward that no backward follows; returns every tensor made, by global name."""
    env = dict(tensors)
    for layer in layers:
        program = programs[layer.program]
        _run(layer, programs, env, [program.operators[position] for position in program.inference])
    return env


@torch.no_grad()
def _run(layer: Layer, programs: Mapping[str, Program], env: dict[str, Tensor], operators: list[Operator]) -> None:
    values = {v.name: v for v in programs[layer.program].values}
    for operator in operators:
        _call(operator, values, env, lambda local: layer.bindings.get(local, f"{layer.name}/{local}"))


def _call(op: Any, values: Mapping[str, Value], env: dict[str, Tensor], name: Any) -> None:
    def decode(item: Any) -> Any:
        if isinstance(item, list):
            return [decode(i) for i in item]
        if isinstance(item, dict):
            ((key, content),) = item.items()
            if key == "operand":
                storage = env[name(content["value"])]
                return torch.as_strided(storage, content["size"], content["stride"], content["offset"])
            if key in ("dtype", "memory_format", "layout"):
                return getattr(torch, content)
            return float(content) if key == "float" else torch.device(content)
        return item

    args, kwargs = [decode(a) for a in op.args], {k: decode(v) for k, v in op.kwargs.items()}
    made: Any
    if op.target in OPERATORS:
        made = tuple(_empty(values[n]) for n in op.outputs)
        OPERATORS[op.target](*args, out=made)
    else:
        namespace, packet, overload = op.target.split(".")
        made = getattr(getattr(getattr(torch.ops, namespace), packet), overload)(*args, **kwargs)
        made = made if isinstance(made, (tuple, list)) else (made,)
    for local, result in zip(op.outputs, made, strict=False):
        if local is not None:
            expected = values[local]
            assert list(result.shape) == expected.shape, (op.target, local)
            # A tensor that is read for its shape may have something in its place that lies otherwise.
            kept = _empty(expected).copy_(result) if op.target in READING_SHAPES else result
            assert list(kept.stride()) == expected.stride, (op.target, local)
            assert str(kept.dtype) == f"torch.{expected.dtype}"
            assert kept.untyped_storage().nbytes() >= expected.bytes
            env[name(local)] = kept


def _empty(value: Value) -> Tensor:
    return torch.empty_strided(value.shape, value.stride, dtype=getattr(torch, value.dtype))
