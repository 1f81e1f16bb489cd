"""A bare graph as arrays: operator i runs for `seconds[i]` and makes one output of `bytes[i]`."""

from __future__ import annotations

from dataclasses import dataclass

from planner.schema import Plan
from profiles.bare import FIXED
from profiles.schema import Profile


@dataclass(frozen=True, kw_only=True)
class Dag:
    """Operators in the order of their first runs; inputs have smaller indices."""

    names: tuple[str, ...]
    seconds: tuple[float, ...]
    bytes: tuple[int, ...]
    workspace: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    users: tuple[tuple[int, ...], ...]
    recomputable: tuple[bool, ...]
    keep: tuple[bool, ...]
    """whether the output must be there at the end"""
    forward: int
    """how many operators come before the first backward one"""
    fixed_bytes: int

    def __len__(self) -> int:
        return len(self.names)

    @property
    def once_seconds(self) -> float:
        """Every operator run once: what no schedule undercuts at any budget."""
        return sum(self.seconds)

    def own_bytes(self, operator: int) -> int:
        """Bytes that must be there while `operator` runs, whatever else is."""
        return self.bytes[operator] + self.workspace[operator] + sum(self.bytes[i] for i in self.inputs[operator])


def dag_of(source: Profile | Plan) -> Dag:
    """The arrays of a profile or plan of model kind ``graph``."""
    program = source.programs[0]
    position = {value.name: index for index, value in enumerate(program.values)}
    kept = {tensor.name for tensor in source.tensors} - {FIXED}
    users: list[list[int]] = [[] for _ in program.operators]
    inputs = tuple(tuple(position[name] for name in op.inputs) for op in program.operators)
    for index, sources in enumerate(inputs):
        for i in sources:
            users[i].append(index)
    return Dag(
        names=tuple(value.name for value in program.values),
        seconds=tuple(op.seconds for op in program.operators),
        bytes=tuple(value.bytes for value in program.values),
        workspace=tuple(op.workspace_bytes for op in program.operators),
        inputs=inputs,
        users=tuple(tuple(u) for u in users),
        recomputable=tuple(op.recomputable for op in program.operators),
        keep=tuple(value.name in kept for value in program.values),
        forward=sum(op.phase == "forward" for op in program.operators),
        fixed_bytes=sum(tensor.bytes for tensor in source.tensors if tensor.name == FIXED),
    )
