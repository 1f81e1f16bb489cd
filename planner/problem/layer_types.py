"""The solver's description of one layer: its operators and the storages to decide on, in local names.

Layers whose `LayerType` is equal share every computation of the planner; only names differ between them. A storage that
crosses layers is either an input of this layer that this layer decides to keep or offload (`owned`), or it has a fixed
lifetime, the same in every plan, that is stated by `enters_forward` and the like.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from tightfit.planner.problem.step_graph import StepGraph, StepOperator
from tightfit.profiles.schema import Channel, Profile


@dataclass(frozen=True, kw_only=True)
class LayerOperator:
    """One operator of the layer."""

    index: int
    """position in the program"""
    inputs: tuple[str, ...]
    """storages with a lifetime; weights, constants and the like left out"""
    weights: tuple[str, ...]
    """frozen weights, and trainables whose values may lie on disk"""
    outputs: tuple[str, ...]
    seconds: float
    recomputable: bool


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """A frozen weight of the layer, or a trainable whose values may lie on disk: sizes in bytes, and its uses.

    A trainable has no packed form: it is fetched where a weight is read and unpacked. Its update follows its last use
    in the backward window, and where it is on disk then, it is written before it is freed.
    """

    bytes: int
    packed_bytes: int
    unpack_seconds: float
    read_seconds: float
    """seconds of the disk for one read"""
    read_compute_seconds: float
    """seconds that one read costs the cores"""
    backward_first: int
    backward_last: int
    """positions of the first and last backward operation that reads it; -1: none does"""
    backward_uses: int
    recomputing: tuple[int, ...]
    """forward operations that read the weight and may run again"""
    modes: tuple[WeightMode, ...]
    """modes that the solver may choose"""
    unpacked_per_use: bool
    """whether each use in the backward window unpacks (and reads) the weight for itself, so that between uses it is
    where it is in its gaps
    """
    trained: bool = False
    repeated: bool = False
    """whether each window uses it several times, once for each tile: `WeightMode.hold` is where it is between these
    uses, in the forward window as in the backward window
    """

    @property
    def read_bytes(self) -> int:
        """Bytes that wait for their use once they are read."""
        return self.bytes if self.trained else self.packed_bytes


@dataclass(frozen=True, order=True)
class WeightMode:
    """Where a weight is between its uses: each of disk, packed, unpacked."""

    backward_gap: str
    """where it is from its last use in the forward window to its first in the backward window"""
    step_gap: str
    """where it is from its last use in the step to its first in the next step"""
    hold: str
    """where it is inside the backward window, from a recomputation that reads it to its use by a backward operator; of
    a weight that is `repeated`, inside both windows from its first use there to its last
    """


@dataclass(frozen=True, kw_only=True)
class TrainableUpdate:
    """The update of a trainable, which takes place once its gradient is complete and its last reader in the backward
    window has run.
    """

    trainable: str
    gradient: str
    after: int
    """position of the backward operation after which it takes place"""
    roles: tuple[str, ...]
    """names of the optimizer states, the sum of gradients last"""
    role_bytes: tuple[int, ...]
    """bytes of each of them in the arena"""
    seconds: float
    """time of the update; where updates are apart, of adding the gradient to its sum"""
    minor: bool
    """whether its states share one decision with those of the layer's other minor trainables"""
    apart_seconds: float = 0.0
    """time of the update itself, where updates are apart"""

    @property
    def states(self) -> int:
        """Number of optimizer states."""
        return len(self.roles)

    @property
    def state_bytes(self) -> int:
        """Bytes of all optimizer states in the arena."""
        return sum(self.role_bytes)


@dataclass(frozen=True, kw_only=True)
class LayerType:
    """The description that equal layers share. Storages are given by local names."""

    program: str
    forward: tuple[LayerOperator, ...]
    backward: tuple[LayerOperator, ...]
    evaluate: tuple[LayerOperator, ...]
    """the forward of an evaluation, where no backward follows"""
    bytes: dict[str, int]
    """storage with a lifetime -> its bytes in the arena, rounded up to the alignment"""
    raw_bytes: dict[str, int]
    """tensor that may go to the spill file -> bytes moved, not rounded up"""
    enters_forward: frozenset[str]
    leaves_forward: frozenset[str]
    enters_backward: frozenset[str]
    leaves_backward: frozenset[str]
    leaves_evaluate: frozenset[str]
    closes_backward: frozenset[str]
    """storages freed at the end of the backward window, not earlier, whatever is recomputed in it"""
    owned: frozenset[str]
    """inputs from other layers that this layer's decision keeps or offloads for its backward"""
    weights: dict[str, LayerWeight]
    updates: tuple[TrainableUpdate, ...]
    candidates: tuple[str, ...]
    """forward storages that the backward window needs, directly or to recompute others"""
    offloadable: frozenset[str]
    events: dict[int, tuple[int, ...]]
    """forward operation -> backward positions before which it may run again"""
    read: Channel
    write: Channel
    apart: int = 0
    """steps after which a schedule of its own updates all trainables, from the sums of their gradients, which are the
    last of their states; 0: each is updated in the backward window
    """
    tiles: int = 1
    """equal runs of forward operators, one for each part of the batch"""
    tile_length: int = 0
    """forward operators of one tile; those after the last tile put together what the tiles have made"""
    alike: dict[str, str] = field(default_factory=dict)
    """candidate of a later tile -> that of the first tile which it equals; slice of a matrix, or of those of the
    experts of a mixture, -> the first slice of equal size; small trainable -> the first small one of equal use: a
    decision is the same for both
    """
    across_evaluate: int = 0
    """where updates are apart: bytes of fixed lifetime that live throughout the window of an evaluation untouched, and
    not during the updates
    """

    @cached_property
    def producer(self) -> dict[str, LayerOperator]:
        return {value: op for op in self.forward for value in op.outputs}

    @cached_property
    def lasting(self) -> frozenset[str]:
        """The candidates that the backward window cannot make again: they are kept or offloaded if it reads them."""
        return frozenset(v for v in self.candidates if v in self.owned or not self.producer[v].recomputable)

    @cached_property
    def position(self) -> dict[int, int]:
        """Position in the program -> position among the operations of the forward."""
        return {op.index: number for number, op in enumerate(self.forward)}

    @cached_property
    def operations(self) -> dict[int, LayerOperator]:
        """Position in the program -> operation, of all three windows."""
        return {op.index: op for op in (*self.forward, *self.evaluate, *self.backward)}

    @cached_property
    def backward_tiles(self) -> tuple[int, ...]:
        """The tile of each backward operation: that of the forward operators whose outputs it reads, or else of the
        operation before it.
        """
        tiles: list[int] = []
        for op in self.backward:
            makers = [self.position[self.producer[value].index] for value in op.inputs if value in self.producer]
            tiles.append(self.tile_of(max(makers)) if makers else tiles[-1] if tiles else self.tiles - 1)
        return tuple(tiles)

    def tile_of(self, position: int) -> int:
        """The tile of a forward operation; what follows the last tile counts as part of that."""
        return min(position // self.tile_length, self.tiles - 1)

    def in_first_tile(self, position: int) -> int:
        """The forward operation of the first tile that does the same; what follows the last tile does nothing of the
        kind.
        """
        return position % self.tile_length if position < self.tiles * self.tile_length else position

    def at_an_end(self, tile: int) -> bool:
        """Whether the tile is among the first or last to be computed. What waits for other tiles grows or shrinks from
        tile to tile, so that the most bytes are held in one of these.
        """
        return tile in {0, self.tiles - 2, self.tiles - 1}

    @cached_property
    def counted(self) -> dict[str, int]:
        """The candidates whose bytes are looked at where a tile `at_an_end` is computed, and how many others each
        stands for, itself included: of the tiles between these all are there or none.
        """
        position = {value: number for number, op in enumerate(self.forward) for value in (*op.outputs, *op.inputs)}
        position |= {value: number for number, op in enumerate(self.forward) for value in op.outputs}
        standing: dict[str, str] = {}
        counted: dict[str, int] = {}
        for value in self.candidates:
            tile = self.tile_of(position[value]) if value in position else 0
            stands = value
            if value in self.alike and not self.at_an_end(tile):
                stands = standing.setdefault(self.alike[value], value)
            counted[stands] = counted.get(stands, 0) + 1
        return counted

    def direct_uses(self, value: str) -> list[int]:
        """Positions of the backward operations that read `value`."""
        return [t for t, op in enumerate(self.backward) if value in op.inputs]


@dataclass(frozen=True, kw_only=True)
class LayeredStep:
    """The whole step as layers of few types, with the bytes that every plan holds whatever it decides."""

    profile: Profile
    graph: StepGraph
    types: tuple[LayerType, ...]
    layer_type: tuple[int, ...]
    """per layer: index into types"""
    constant_bytes: int
    """bytes resident all the time: constants, the batch, and trainables but for those in `moving`"""
    across_forward: tuple[int, ...]
    across_backward: tuple[int, ...]
    across_evaluate: tuple[int, ...]
    """per layer: bytes of storages of fixed lifetime that live throughout the window without being touched in it"""
    always: tuple[str, ...]
    """names of the storages that are resident all the time"""
    moving: frozenset[str]
    """trainables whose values may lie on disk between their uses"""
    workspace_bytes: int
    forced: frozenset[str] = field(default_factory=frozenset)
    """storages that several layers' backward windows need, or that leave no choice: kept from when they are made to
    their last possible use
    """

    @property
    def taken_bytes(self) -> int:
        """Bytes of the process that are neither arena nor instructions, so the same for every schedule: floor and
        workspace.
        """
        return self.profile.device.floor.held_bytes + self.workspace_bytes

    @cached_property
    def inputs(self) -> dict[tuple[int, int], tuple[str, ...]]:
        """(layer, operator) -> tensors that it reads."""
        return {(step.layer, step.operator): step.inputs for step in (*self.graph.steps, *self.graph.inference)}

    @cached_property
    def forward_steps(self) -> tuple[tuple[StepOperator, ...], ...]:
        """The forward steps of each layer."""
        ahead = [step for step in self.graph.steps if step.phase == "forward"]
        return tuple(tuple(step for step in ahead if step.layer == layer) for layer in range(len(self.layer_type)))

    def name(self, layer: int, value: str) -> str:
        """Storage name of a layer's local value."""
        return self.graph.names[layer].get(value, value)


def weight_uses(operations: Iterable[LayerOperator]) -> dict[str, tuple[int, int]]:
    """Weight -> positions of its first and last reader."""
    result: dict[str, tuple[int, int]] = {}
    for position, op in enumerate(operations):
        for weight in op.weights:
            result[weight] = (result.get(weight, (position, position))[0], position)
    return result


ALWAYS = frozenset({"constant", "batch", "trainable"})


def transfer_seconds(channel: Channel, size: int) -> float:
    """Seconds for which a transfer of `size` bytes occupies the channel."""
    return channel.latency_seconds + size / channel.bytes_per_second


def compute_seconds(channel: Channel, size: int) -> float:
    """Seconds that a transfer of `size` bytes costs the cores, while it overlaps with computation."""
    return channel.compute_seconds_per_transfer + size * channel.compute_seconds_per_byte
