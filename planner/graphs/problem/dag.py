"""A bare graph as arrays: operator i runs for `seconds[i]` and makes one output of `bytes[i]`.

Where the graph names a disk, an output may be moved there and fetched back. A search that only knows re-runs gets the
graph that `Dag.moving` returns: for a fixed set of moved outputs, "run operator i again" there means "fetch output i",
at a given price.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tightfit.planner.problem.layer_types import transfer_seconds
from tightfit.planner.schema import Plan
from tightfit.profiles.graph_input import FIXED, NO_CHANNEL
from tightfit.profiles.schema import Channel, Profile

T = TypeVar("T")


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
    again_seconds: tuple[float, ...]
    again_inputs: tuple[tuple[int, ...], ...]
    again_workspace: tuple[int, ...]
    """`again_…`: seconds, inputs and workspace of a re-run; the same as for the first run, unless
    the output is moved
    """
    moved: frozenset[int] = frozenset()
    """operators whose re-runs stand for fetches of their outputs"""
    read: Channel | None = None
    write: Channel | None = None
    """the disk; None: the graph names none"""
    sink: bool = False
    """whether the last operator is artificial: it takes no time and reads every output that must be there at the end"""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def once_seconds(self) -> float:
        """Seconds of every operator run once: a lower bound at any budget."""
        return sum(self.seconds)

    @property
    def operators(self) -> int:
        """How many operators the graph has, without the artificial sink."""
        return len(self) - self.sink

    @property
    def floor_bytes(self) -> int:
        """Bytes that the most demanding operator needs by itself, fixed bytes included: no schedule
        has a lower peak.
        """
        return self.fixed_bytes + max(self.own_bytes(i) for i in range(len(self)))

    def own_bytes(self, operator: int) -> int:
        """Bytes that `operator` alone needs while it runs: its output, workspace and inputs."""
        return self.bytes[operator] + self.workspace[operator] + sum(self.bytes[i] for i in self.inputs[operator])

    def moving(self, outputs: Iterable[int], price: float) -> Dag:
        """The graph with `outputs` moved: a re-run of one is a fetch, and costs `price` times the seconds of its write
        and fetch.
        """
        assert self.read is not None
        moved = frozenset(outputs)

        def chosen(there: Sequence[T], otherwise: Sequence[T]) -> tuple[T, ...]:
            return tuple(a if i in moved else b for i, (a, b) in enumerate(zip(there, otherwise)))

        trips = [price * self.trip_seconds(i) for i in range(len(self))]
        return replace(
            self,
            recomputable=chosen([True] * len(self), self.recomputable),
            again_seconds=chosen(trips, self.seconds),
            again_inputs=chosen([()] * len(self), self.inputs),
            again_workspace=chosen([0] * len(self), self.workspace),
            moved=moved,
        )

    def trip_seconds(self, operator: int) -> float:
        """Seconds of the disk to write an output and read it back once."""
        assert self.read is not None
        assert self.write is not None
        size = self.bytes[operator]
        return transfer_seconds(self.write, size) + transfer_seconds(self.read, size)


def dag_of(source: Profile | Plan) -> Dag:
    """The arrays of a profile or plan of model kind ``graph``."""
    program = source.programs[0]
    position = {value.name: index for index, value in enumerate(program.values)}
    kept = {tensor.name for tensor in source.tensors} - {FIXED}
    inputs = [tuple(position[name] for name in op.inputs) for op in program.operators]
    names = [value.name for value in program.values]
    seconds = [op.seconds for op in program.operators]
    sizes = [value.bytes for value in program.values]
    workspace = [op.workspace_bytes for op in program.operators]
    recomputable = [op.recomputable for op in program.operators]
    forward = sum(op.phase == "forward" for op in program.operators)
    disk = source.device.read != NO_CHANNEL
    sink = bool(kept - {names[-1]}) or (disk and bool(kept))
    if sink:
        # Outputs that must be there at the end may be moved or freed before: a last operator reads them all.
        inputs.append(tuple(sorted(position[name] for name in kept)))
        names.append("")
        seconds.append(0.0)
        sizes.append(0)
        workspace.append(0)
        recomputable.append(False)
    users: list[list[int]] = [[] for _ in inputs]
    for index, sources in enumerate(inputs):
        for i in sources:
            users[i].append(index)
    return Dag(
        names=tuple(names),
        seconds=tuple(seconds),
        bytes=tuple(sizes),
        workspace=tuple(workspace),
        inputs=tuple(inputs),
        users=tuple(tuple(u) for u in users),
        recomputable=tuple(recomputable),
        keep=tuple(not sink and name in kept for name in names),
        forward=forward if forward < len(program.operators) else len(inputs),
        fixed_bytes=sum(tensor.bytes for tensor in source.tensors if tensor.name == FIXED),
        again_seconds=tuple(seconds),
        again_inputs=tuple(inputs),
        again_workspace=tuple(workspace),
        read=source.device.read if disk else None,
        write=source.device.write if disk else None,
        sink=sink,
    )
