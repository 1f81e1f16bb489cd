"""What a trace of a module consists of: layers, each bound to a program of operators, and the tensors between them."""

from __future__ import annotations

import types
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from tightfit.profiles.schema import Layer, Program, Tensor


@dataclass(frozen=True, kw_only=True)
class Trace:
    tensors: list[Tensor]
    programs: list[Program]
    layers: list[Layer]
    loss: str
    token_losses: str | None
    code: AbstractSet[types.CodeType] = frozenset()
    """the module's own that its forward ran"""
    other_evaluation: str | None = None
    """why an evaluation is not what the module computes in eval mode; None: it is"""


def global_tensors(layers: list[Layer], by_name: dict[str, Program]) -> list[Tensor]:
    """The global tensors, each once.

    A weight that is read only through slices is left out, unless rows are gathered from it.
    """
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        program = by_name[layer.program]
        used = {name for op in program.operators for name in (*op.inputs, *op.outputs) if name}
        for value in program.values:
            name = layer.bindings.get(value.name)
            if name is not None and name not in tensors and value.name in used:
                tensors[name] = Tensor(
                    name=name,
                    kind=value.kind,
                    shape=value.shape,
                    dtype=value.dtype,
                    bytes=value.bytes,
                    movable=value.kind == "trainable",
                )
    return list(tensors.values())
