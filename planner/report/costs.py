"""Counts on a plan's schedule what each tensor's decision costs per training step, without an update that is apart, and
which tensors are resident at an instruction.

The figures add up to the simulator's: seconds of recomputed operators to `recompute_seconds`, reads and writes to its
bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tightfit.planner.instructions import Accumulate, Fetch, Free, Instruction, Pass, Read, Run, Spill, Unpack
from tightfit.planner.problem.layer_types import transfer_seconds
from tightfit.planner.problem.step_graph import SUM
from tightfit.planner.problem.tensor_index import IndexedTensor, TensorIndex
from tightfit.planner.schema import Phase, Plan
from tightfit.profiles.schema import Operator

NEVER = 1e12
"""seconds; a channel that takes longer is that of a graph without a disk"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one tensor costs per training step."""

    kind: str
    """weight, trainable, optimizer, activation, gradient, constant or batch"""
    bytes: int
    decision: str | None
    """kept, recomputed, offloaded, streamed, packed, unpacked; None where nothing was to be decided"""
    recompute_seconds: float = 0.0
    """seconds of operators that run again to make it"""
    unpack_seconds: float = 0.0
    read_bytes: int = 0
    read_seconds: float = 0.0
    """seconds that the reads occupy the channel; likewise `write_seconds`"""
    write_bytes: int = 0
    write_seconds: float = 0.0

    @property
    def compute_seconds(self) -> float:
        """Seconds of the cores for recomputing or unpacking it."""
        return self.recompute_seconds + self.unpack_seconds

    @property
    def transfer_seconds(self) -> float:
        """Seconds of the channels."""
        return self.read_seconds + self.write_seconds

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written."""
        return self.read_bytes + self.write_bytes


class CostLedger:
    """A plan's tensors and programs, and what its decisions cost."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.index = TensorIndex(plan)
        self.programs = {layer.name: layer.program for layer in plan.layers}

    def ran(self) -> list[Operator]:
        """Every operator of the training step, as often as it runs, in order."""
        return [self.index.operators[layer][position] for layer, position in self._runs()]

    def _runs(self) -> list[tuple[str, int]]:
        """(layer, position of an operator there) of each run, in order."""
        return [(entry.layer, entry.operator) for entry in self._instructions() if isinstance(entry, Run)]

    def again(self) -> list[tuple[str, int]]:
        """The same of operators that run again."""
        ran: set[tuple[str, int]] = set()
        repeated = []
        for run in self._runs():
            if run in ran:
                repeated.append(run)
            ran.add(run)
        return repeated

    def _instructions(self) -> Sequence[Instruction]:
        return [] if self.plan.train is None else self.plan.train.instructions

    def costs(self) -> dict[str, Cost]:
        """Every tensor that was decided on, or that costs anything in the training step."""
        plan, tensors = self.plan, self.index.tensors
        unknown = IndexedTensor(kind="activation", bytes=0)
        costs = {
            name: Cost(kind=tensors.get(name, unknown).kind, bytes=tensors.get(name, unknown).bytes, decision=decision)
            for name, decision in plan.decisions.items()
        }

        def charge(name: str, **more: float) -> None:
            cost = costs.get(name) or Cost(kind=tensors[name].kind, bytes=tensors[name].bytes, decision=None)
            costs[name] = replace(cost, **{field: getattr(cost, field) + extra for field, extra in more.items()})

        for layer, position in self.again():
            names = self.index.outputs(layer, position)
            # The seconds of an operator with several outputs are charged to the first one decided to be recomputed, or
            # else to its first.
            recomputed = [name for name in names if plan.decisions.get(name) == "recomputed"]
            charge((recomputed or names)[0], recompute_seconds=self.index.operators[layer][position].seconds)
        device = plan.device
        for instruction in self._instructions():
            match instruction:
                case Unpack(weight):
                    charge(weight, unpack_seconds=tensors[weight].unpack_seconds)
                case Read(name) | Fetch(name):
                    size = tensors[name].packed_bytes if isinstance(instruction, Read) else tensors[name].bytes
                    charge(name, read_bytes=size, read_seconds=transfer_seconds(device.read, size))
                case Spill(tensor):
                    size = tensors[tensor].bytes
                    charge(tensor, write_bytes=size, write_seconds=transfer_seconds(device.write, size))
        return costs

    def other_ways(self, name: str) -> tuple[float | None, float | None]:
        """What a tensor would cost that does not stay in memory: seconds of making it once more, and seconds of the
        channel for moving it there and back; of a weight, of unpacking it once, and of reading it once. None where that
        cannot be.
        """
        tensor, device = self.index.tensors[name], self.plan.device
        if tensor.kind == "weight":
            read = transfer_seconds(device.read, tensor.packed_bytes) if tensor.packed_bytes else None
            return (tensor.unpack_seconds, read)
        both = [transfer_seconds(channel, tensor.bytes) for channel in (device.read, device.write)]
        move = sum(both) if max(both) < NEVER else None
        makers = self._makers.get(name, [])
        makers = [operator for operator in makers if operator.phase == "forward"] or makers
        if not makers or not all(operator.recomputable for operator in makers):
            return (None, move)
        return (sum(operator.seconds for operator in makers), move)

    @cached_property
    def _makers(self) -> dict[str, list[Operator]]:
        """Tensor -> the operators that make it."""
        makers: dict[str, list[Operator]] = defaultdict(list)
        for layer, operators in self.index.operators.items():
            for position, operator in enumerate(operators):
                if operator.phase != "inference":
                    for name in self.index.outputs(layer, position):
                        makers[name].append(operator)
        return makers

    def resident_at(self, phase: Phase, instruction: int) -> dict[str, int]:
        """Bytes of every tensor resident while `instruction` runs, those that it makes and those that it frees
        included.
        """
        resident = dict.fromkeys(self.plan.resident)
        for index, entry in enumerate(phase.instructions[: instruction + 1]):
            match entry:
                case Run(layer, operator):
                    resident |= dict.fromkeys(self.index.outputs(layer, operator))
                case Read(weight):
                    resident[f"packed:{weight}"] = None
                case Unpack(name) | Fetch(name):
                    resident[name] = None
                case Accumulate(trainable):
                    resident[f"{SUM}{trainable}"] = None
                case Pass(above, below):
                    del resident[above]
                    resident[below] = None
                case Free(tensor) if index < instruction:
                    del resident[tensor]
        return {name: self.index.tensors[name].bytes for name in resident}
