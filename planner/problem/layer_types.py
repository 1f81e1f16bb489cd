"""What the solver sees of one layer: its operators over the storages that are open to decision, in local names.

Layers whose `LayerType` is equal share every computation of the planner; only names differ between them. A storage that
crosses layers is either a layer input whose fate between forward and backward this layer decides (`owned`), or it has a
fixed lifetime that is the same in every plan and enters here as facts (`enters_forward`, ...).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from tightfit.planner.problem.step_graph import Step, StepGraph
from tightfit.profiles.schema import Channel, Profile


@dataclass(frozen=True, kw_only=True)
class Operation:
    index: int
    """position in the program"""
    inputs: tuple[str, ...]
    """storages with a lifetime; weights, constants and the like left out"""
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    seconds: float
    recomputable: bool


@dataclass(frozen=True, kw_only=True)
class Weight:
    bytes: int
    packed_bytes: int
    unpack_seconds: float
    read_seconds: float
    """of the disk"""
    read_compute_seconds: float
    """compute time that the read costs beside"""
    backward_first: int
    backward_last: int
    """positions among the backward operations; -1 without a direct use there"""
    backward_uses: int
    recomputing: tuple[int, ...]
    """forward operations that read the weight and may run again"""
    modes: tuple[Mode, ...]
    """allowed residencies"""
    alone: bool
    """every use in the backward window stands alone: the weight is back in its gap's place between them"""


@dataclass(frozen=True, order=True)
class Mode:
    """Where a weight is between its uses: each of disk, packed, unpacked."""

    backward_gap: str
    """from its last forward use to its first use in the backward window"""
    step_gap: str
    """from its last use in the step to its first use in the next"""
    hold: str
    """inside the backward window, from a recomputation that reads it to its use in the backward"""


@dataclass(frozen=True, kw_only=True)
class Update:
    """A trainable that is updated once its last reader in the backward window is through."""

    trainable: str
    gradient: str
    after: int
    """position among the backward operations"""
    state_bytes: int
    """of one optimizer state"""
    states: int
    seconds: float
    minor: bool
    """shares one decision with the layer's other minor trainables"""


@dataclass(frozen=True, kw_only=True)
class LayerType:
    program: str
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    evaluate: tuple[Operation, ...]
    """the forward where no backward follows"""
    bytes: dict[str, int]
    """storages with a lifetime: aligned bytes"""
    raw_bytes: dict[str, int]
    """of everything that may go to the spill file: bytes moved"""
    enters_forward: frozenset[str]
    leaves_forward: frozenset[str]
    enters_backward: frozenset[str]
    leaves_backward: frozenset[str]
    leaves_evaluate: frozenset[str]
    closes_backward: frozenset[str]
    """freed when the backward window ends, whatever is recomputed in it"""
    owned: frozenset[str]
    """layer inputs kept or offloaded for the backward by this layer's decision"""
    weights: dict[str, Weight]
    updates: tuple[Update, ...]
    candidates: tuple[str, ...]
    """forward storages that the backward window needs, directly or to recompute others"""
    offloadable: frozenset[str]
    events: dict[int, tuple[int, ...]]
    """forward operation -> backward positions before which it may run again"""
    read: Channel
    write: Channel

    @cached_property
    def producer(self) -> dict[str, Operation]:
        return {value: op for op in self.forward for value in op.outputs}

    @cached_property
    def operations(self) -> dict[int, Operation]:
        """By their positions in the program."""
        return {op.index: op for op in (*self.forward, *self.evaluate, *self.backward)}

    def direct_uses(self, value: str) -> list[int]:
        """Positions of the backward operations that read `value`."""
        return [t for t, op in enumerate(self.backward) if value in op.inputs]


@dataclass(frozen=True, kw_only=True)
class Layered:
    """The whole step as layers of few types, and what every plan holds whatever it decides."""

    profile: Profile
    graph: StepGraph
    types: tuple[LayerType, ...]
    layer_type: tuple[int, ...]
    """per layer: index into types"""
    constant_bytes: int
    """parameters, constants and batch: resident all the time"""
    across_forward: tuple[int, ...]
    across_backward: tuple[int, ...]
    across_evaluate: tuple[int, ...]
    """per layer: bytes of storages of fixed lifetime that the window neither makes, reads nor frees"""
    always: tuple[str, ...]
    """names of what is resident all the time"""
    workspace_bytes: int
    forced: frozenset[str] = field(default_factory=frozenset)
    """storages of several layers' backward windows: kept from their making to their last possible use"""

    @property
    def taken_bytes(self) -> int:
        """Of the process, whatever its schedule: what is neither arena nor instructions."""
        return self.profile.device.floor.held_bytes + self.workspace_bytes

    @cached_property
    def inputs(self) -> dict[tuple[int, int], tuple[str, ...]]:
        """(layer, operator) -> tensors that it reads."""
        return {(step.layer, step.operator): step.inputs for step in (*self.graph.steps, *self.graph.inference)}

    @cached_property
    def forward_steps(self) -> tuple[tuple[Step, ...], ...]:
        """Per layer."""
        ahead = [step for step in self.graph.steps if step.phase == "forward"]
        return tuple(tuple(step for step in ahead if step.layer == layer) for layer in range(len(self.layer_type)))

    def name(self, layer: int, value: str) -> str:
        """Storage name of a layer's local value."""
        return self.graph.names[layer].get(value, value)


def weight_uses(operations: Iterable[Operation]) -> dict[str, tuple[int, int]]:
    """Weight -> positions of its first and last reader."""
    result: dict[str, tuple[int, int]] = {}
    for position, op in enumerate(operations):
        for weight in op.weights:
            result[weight] = (result.get(weight, (position, position))[0], position)
    return result


ALWAYS = frozenset({"constant", "batch", "trainable"})


def transfer_seconds(channel: Channel, size: int) -> float:
    return channel.latency_seconds + size / channel.bytes_per_second


def compute_seconds(channel: Channel, size: int) -> float:
    """What one transfer beside the computation costs the cores."""
    return channel.compute_seconds_per_transfer + size * channel.compute_seconds_per_byte
