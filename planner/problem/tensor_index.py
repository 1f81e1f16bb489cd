"""An index by name of all tensors of a profile or plan: global tensors, values of layers, optimizer states, packed
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.planner.problem.step_graph import state_bytes, state_names, state_roles
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Operator, Profile
from tightfit.runtime.common.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedTensor:
    """One tensor, with its sizes in bytes and its seconds."""

    kind: str
    """its kind in the profile; ``optimizer`` for a state, ``packed`` for a weight's packed bytes"""
    bytes: int
    packed_bytes: int = 0
    unpack_seconds: float = 0.0
    update_seconds: float = 0.0
    """as the profile measured it"""


class TensorIndex:
    """The tensors of a profile or plan, in the order in which it names them."""

    def __init__(self, source: Profile | Plan) -> None:
        """Raises InputError for a layer whose program is missing."""
        self.tensors: dict[str, IndexedTensor] = {
            tensor.name: IndexedTensor(
                kind=tensor.kind,
                bytes=tensor.bytes,
                packed_bytes=tensor.packed_bytes,
                unpack_seconds=tensor.unpack_seconds,
                update_seconds=tensor.update_seconds,
            )
            for tensor in source.tensors
        }
        self.operators: dict[str, list[Operator]] = {}
        """layer -> operators of its program"""
        self.inference: dict[str, list[int]] = {}
        """layer -> positions of the operators that it runs in an evaluation"""
        self.names: dict[str, dict[str, str]] = {}
        """layer -> value of its program -> name of the tensor"""
        programs = {program.name: program for program in source.programs}
        for layer in source.layers:
            program = programs.get(layer.program)
            if program is None:
                raise InputError(f"layer {layer.name}: its program {layer.program!r} is not there")
            names = {
                value.name: layer.bindings.get(value.name, f"{layer.name}/{value.name}") for value in program.values
            }
            for value in program.values:
                self.tensors.setdefault(names[value.name], IndexedTensor(kind=value.kind, bytes=value.bytes))
            self.operators[layer.name], self.inference[layer.name] = program.operators, program.inference
            self.names[layer.name] = names
        self.states: dict[str, tuple[str, ...]] = {
            name: state_names(name, state_roles(source.optimizer)) for name in self.of_kind("trainable")
        }
        """trainable -> names of its optimizer states"""
        declared = {tensor.name: tensor for tensor in source.tensors}
        for name, states in self.states.items():
            for role, state in zip(state_roles(source.optimizer), states, strict=True):
                size = state_bytes(role, declared[name]) if name in declared else self.tensors[name].bytes
                self.tensors[state] = IndexedTensor(kind="optimizer", bytes=size)
        for name in self.of_kind("weight"):
            if packed := self.tensors[name].packed_bytes:
                self.tensors[f"packed:{name}"] = IndexedTensor(kind="packed", bytes=packed)

    def of_kind(self, kind: str) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.kind == kind]

    def owners(self) -> dict[str, str]:
        """Tensor -> the layer that it is shown with: the first that names it."""
        layer_of: dict[str, str] = {}
        for layer, names in self.names.items():
            for name in names.values():
                layer_of.setdefault(name, layer)
                for state in self.states.get(name, ()):
                    layer_of.setdefault(state, layer)
        return layer_of

    def outputs(self, layer: str, position: int) -> list[str]:
        """Tensors that an operator of the layer makes, without outputs that nothing needs."""
        return [self.names[layer][value] for value in self.operators[layer][position].outputs if value is not None]
