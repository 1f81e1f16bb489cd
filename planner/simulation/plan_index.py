"""What a plan declares, indexed for its replay: tensors, operators under their layers' names, who makes and updates what."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.planner.problem.gradients import equal_passages, update_seconds
from tightfit.planner.problem.step_graph import state_count, state_names
from tightfit.planner.schema import MEZO, Phase, Plan
from tightfit.profiles.schema import Operator
from tightfit.runtime.common.errors import InputError


class InvalidSchedule(InputError):  # noqa: N818  named by what it is about, like the rest of the tree
    """A plan that must not run."""

    def __init__(self, invariant: str, phase: str, instruction: int, tensor: str, text: str) -> None:
        where = f"{phase} instruction {instruction}" if instruction >= 0 else phase
        super().__init__(f"invalid schedule ({invariant}) at {where}, {tensor}: {text}; plan again from the profile")
        self.invariant = invariant
        self.phase = phase
        self.instruction = instruction
        self.tensor = tensor


@dataclass(kw_only=True)
class DeclaredTensor:
    kind: str
    bytes: int
    packed_bytes: int = 0
    unpack_seconds: float = 0.0
    update_seconds: float = 0.0


class Declared:
    """The plan's declarations, indexed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device = plan.device
        phases = [*plan.steps, *([] if plan.evaluate is None else [plan.evaluate])]
        self.instructions = sum(len(phase.instructions) for phase in phases)
        self.two_forwards = plan.optimizer.get("name") == MEZO
        self.tensors: dict[str, DeclaredTensor] = {}
        for tensor in plan.tensors:
            self.tensors[tensor.name] = DeclaredTensor(
                kind=tensor.kind,
                bytes=tensor.bytes,
                packed_bytes=tensor.packed_bytes,
                unpack_seconds=tensor.unpack_seconds,
                update_seconds=update_seconds(tensor, plan.optimizer),
            )
        programs = {program.name: program for program in plan.programs}
        self.layers: dict[str, tuple[list[Operator], dict[str, str]]] = {}
        self.inference: dict[str, list[int]] = {}
        """layer -> positions of what it runs where no backward follows"""
        for layer in plan.layers:
            if layer.program not in programs:
                raise InvalidSchedule(
                    "form", "plan", -1, layer.name, f"its program {layer.program!r} is not in the plan"
                )
            program = programs[layer.program]
            names = {v.name: layer.bindings.get(v.name, f"{layer.name}/{v.name}") for v in program.values}
            for value in program.values:
                self.tensors.setdefault(names[value.name], DeclaredTensor(kind=value.kind, bytes=value.bytes))
            self.layers[layer.name] = (program.operators, names)
            self.inference[layer.name] = program.inference
        self.order = [layer.name for layer in plan.layers]
        states = state_count(plan.optimizer)
        self.trainables: dict[str, list[str]] = {}
        for name in [n for n, t in self.tensors.items() if t.kind == "trainable"]:
            self.trainables[name] = list(state_names(name, states))
            for state in self.trainables[name]:
                self.tensors[state] = DeclaredTensor(kind="optimizer", bytes=self.tensors[name].bytes)
        for name in [n for n, t in self.tensors.items() if t.kind == "weight" and t.packed_bytes]:
            self.tensors[f"packed:{name}"] = DeclaredTensor(kind="packed", bytes=self.tensors[name].packed_bytes)
        self.passages = {above: (layer, below) for layer, (above, below) in equal_passages(plan).items() if below}
        """gradient of a layer's output -> the layer and the gradient of its input, where their shapes are equal"""

    def makers(self, phase: Phase) -> dict[str, int]:
        """Tensor -> how often an operator makes it in a phase, recomputation left aside."""
        result: dict[str, int] = {}
        for layer, (operators, names) in self.layers.items():
            for operator in operators:
                if operator.phase == "inference" or (operator.phase == "backward" and layer in phase.skipped):
                    continue
                for output in filter(None, operator.outputs):
                    result[names[output]] = result.get(names[output], 0) + 1
        return result
