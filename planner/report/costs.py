"""What each tensor's decision costs in a training step, and what is resident at an instruction: counted on the schedule.

The figures add up to the simulator's: recomputed operators to `recompute_seconds`, reads and writes to its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tightfit.planner.instructions import Fetch, Free, Instruction, Pass, Read, Run, Spill, Unpack
from tightfit.planner.problem.layer_types import transfer_seconds
from tightfit.planner.problem.step_graph import state_count, state_names
from tightfit.planner.schema import Phase, Plan
from tightfit.profiles.schema import Layer, Operator


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One tensor."""

    kind: str
    """weight, trainable, optimizer, activation, gradient, constant or batch"""
    bytes: int
    decision: str | None
    """kept, recomputed, offloaded, streamed, packed, unpacked; None where nothing was to be decided"""
    recompute_seconds: float = 0.0
    """operators that run again to make it"""
    unpack_seconds: float = 0.0
    read_bytes: int = 0
    read_seconds: float = 0.0
    """of the channel"""
    write_bytes: int = 0
    write_seconds: float = 0.0

    @property
    def compute_seconds(self) -> float:
        """Of the cores, for making it again or unpacking it."""
        return self.recompute_seconds + self.unpack_seconds


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """An operator that runs again."""

    layer: str
    program: str
    operator: str
    """its target"""
    seconds: float


class Ledger:
    """A plan's tensors and programs, indexed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        programs = {program.name: program for program in plan.programs}
        self.layers: dict[str, Layer] = {layer.name: layer for layer in plan.layers}
        self.operators = {layer.name: programs[layer.program].operators for layer in plan.layers}
        self.kinds: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.packed: dict[str, int] = {}
        self.unpack: dict[str, float] = {}
        states = state_count(plan.optimizer)
        for tensor in plan.tensors:
            self._add(tensor.name, tensor.kind, tensor.bytes)
            self.packed[tensor.name] = tensor.packed_bytes
            self.unpack[tensor.name] = tensor.unpack_seconds
            if tensor.kind == "weight":
                self._add(f"packed:{tensor.name}", "packed", tensor.packed_bytes)
            if tensor.kind == "trainable":
                for state in state_names(tensor.name, states):
                    self._add(state, "optimizer", tensor.bytes)
        for layer in plan.layers:
            for value in programs[layer.program].values:
                self._add(self.name(layer.name, value.name), value.kind, value.bytes)

    def _add(self, name: str, kind: str, size: int) -> None:
        self.kinds.setdefault(name, kind)
        self.sizes.setdefault(name, size)

    def name(self, layer: str, value: str) -> str:
        """Storage name of a layer's value."""
        return self.layers[layer].bindings.get(value, f"{layer}/{value}")

    def outputs(self, layer: str, operator: Operator) -> list[str]:
        return [self.name(layer, value) for value in operator.outputs if value is not None]

    def repeated(self) -> list[Repeated]:
        """Operators of the training step that run again, in order."""
        return [
            Repeated(
                layer=layer,
                program=self.layers[layer].program,
                operator=self.operators[layer][position].target,
                seconds=self.operators[layer][position].seconds,
            )
            for layer, position in self._again()
        ]

    def _again(self) -> list[tuple[str, int]]:
        ran: set[tuple[str, int]] = set()
        again = []
        for instruction in self._instructions():
            if isinstance(instruction, Run):
                place = (instruction.layer, instruction.operator)
                if place in ran:
                    again.append(place)
                ran.add(place)
        return again

    def _instructions(self) -> Sequence[Instruction]:
        return [] if self.plan.train is None else self.plan.train.instructions

    def costs(self) -> dict[str, Cost]:
        """Every tensor that was decided on, or that costs anything in the training step."""
        plan = self.plan
        costs = {
            name: Cost(kind=self.kinds.get(name, "activation"), bytes=self.sizes.get(name, 0), decision=decision)
            for name, decision in plan.decisions.items()
        }

        def charge(name: str, **more: float) -> None:
            before = costs.get(name) or Cost(kind=self.kinds[name], bytes=self.sizes[name], decision=None)
            costs[name] = replace(before, **{field: getattr(before, field) + extra for field, extra in more.items()})

        for layer, position in self._again():
            operator = self.operators[layer][position]
            names = self.outputs(layer, operator)
            # An operator of several outputs is charged to the one that had to be made again, or to its first.
            wanted = [name for name in names if plan.decisions.get(name) == "recomputed"]
            charge((wanted or names)[0], recompute_seconds=operator.seconds)
        device = plan.device
        for instruction in self._instructions():
            match instruction:
                case Unpack(weight):
                    charge(weight, unpack_seconds=self.unpack[weight])
                case Read(name) | Fetch(name):
                    size = self.packed[name] if isinstance(instruction, Read) else self.sizes[name]
                    charge(name, read_bytes=size, read_seconds=transfer_seconds(device.read, size))
                case Spill(tensor):
                    size = self.sizes[tensor]
                    charge(tensor, write_bytes=size, write_seconds=transfer_seconds(device.write, size))
        return costs

    def resident_at(self, phase: Phase, instruction: int) -> dict[str, int]:
        """Bytes of every tensor resident while `instruction` runs: what it makes there already, what it frees still."""
        there = dict.fromkeys(self.plan.resident)
        for index, one in enumerate(phase.instructions[: instruction + 1]):
            match one:
                case Run(layer, operator):
                    there |= dict.fromkeys(self.outputs(layer, self.operators[layer][operator]))
                case Read(weight):
                    there[f"packed:{weight}"] = None
                case Unpack(name) | Fetch(name):
                    there[name] = None
                case Pass(above, below):
                    del there[above]
                    there[below] = None
                case Free(tensor) if index < instruction:
                    del there[tensor]
        return {name: self.sizes[name] for name in there}
