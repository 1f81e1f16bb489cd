"""Plans of a device's stages: one planner for every run of layers, and what is proven of those that were not planned.

A floor that is higher by the bytes of messages leaves a schedule the same room as a budget that is lower by as much, so
that plans are made by **room**, as in `member_plans`.

What holds for some layers holds for more: a schedule of a stage, with all that belongs to other layers left out, is one
of the layers inside it, but for the operators that send and receive. So the seconds that no plan of a stage undercuts,
less those of its messages, bound every stage that contains it; where nothing fits of it, nothing fits of them. Numbers in
brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tightfit.planner.fleet.member_plans import RoomPlans
from tightfit.planner.fleet.member_profiles import alone_profile
from tightfit.planner.fleet.parts import message_bytes, messages_bytes
from tightfit.planner.fleet.pipeline_marks import Marks, marks_of
from tightfit.planner.fleet.stages import Cut, cuts, stage_profile
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Profile, Program
from tightfit.runtime.engine.fleet.message import ring
from tightfit.runtime.engine.training.job import RECEIVE, SEND

Layers = tuple[int, int]
"""a run of layers: the first one, and the one after the last"""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A plan that was found, and when it reaches its messages."""

    plan: Plan
    train: Marks
    forward: Marks


def _known(made: Plan, room: int) -> Known:
    train, forward = marks_of(made)
    return Known(plan=made, train=train, forward=forward)


class _Stage(RoomPlans[Known]):
    """The plans of one stage."""

    def __init__(self, profile: Profile, gap: float) -> None:
        super().__init__(profile, gap, _known)
        programs = {program.name: program for program in profile.programs}
        operators = [one for layer in profile.layers for one in programs[layer.program].operators]
        self.messages_seconds = sum(one.seconds for one in operators if one.target in (RECEIVE, SEND))
        """of the operators that send and receive"""


class StagePlans:
    """The stages of a device, as parts of a step of so many micro-batches."""

    def __init__(self, profile: Profile, micro_batches: int, bits: int, gap: float) -> None:
        self.profile, self.micro_batches, self.bits, self.gap = profile, micro_batches, bits, gap
        self.cuts: dict[int, Cut] = {cut.at: cut for cut in cuts(profile)}
        """by the number of the first layer above"""
        self.layers = len(profile.layers)
        self.up_bytes = {at: message_bytes(cut.up_passing, bits) for at, cut in self.cuts.items()}
        """of a message, by cut"""
        self.down_bytes = {at: message_bytes(cut.down_passing, bits) for at, cut in self.cuts.items()}
        self._stages: dict[Layers, _Stage] = {}
        self._restated: dict[tuple[Layers, int, int], Plan] = {}
        self._sums = _Sums(alone_profile(profile, micro_batches))

    # --- memory ----------------------------------------------------------------------------------------------------

    def extra_bytes(self, layers: Layers, ahead_below: int) -> int:
        """Bytes that the stage holds for its messages."""
        first, last = layers
        return messages_bytes(
            self.profile.device.floor,
            from_below=self.up_bytes.get(first, 0),
            to_below=self.down_bytes.get(first, 0),
            to_above=self.up_bytes.get(last, 0),
            from_above=self.down_bytes.get(last, 0),
            buffers=ring(ahead_below),
        )

    def room(self, layers: Layers, budget_bytes: int, ahead_below: int) -> int:
        """Bytes of the budget that are left for the stage's plan; none where the start of the process takes more."""
        if budget_bytes < self.profile.device.floor.start_peak_bytes:
            return 0
        return budget_bytes - self.extra_bytes(layers, ahead_below)

    def smallest(self) -> list[Layers]:
        """The runs of layers that no cut divides."""
        ends = [0, *sorted(self.cuts), self.layers]
        return list(pairwise(ends))

    # --- what is known ---------------------------------------------------------------------------------------------

    def best(self, layers: Layers, room: int) -> Known | None:
        """The fastest known plan that fits."""
        stage = self._stages.get(layers)
        fitting = stage.fitting(room) if stage else []
        return min(fitting, key=lambda one: (one.train.seconds, one.forward.seconds), default=None)

    def planned(self, layers: Layers, room: int) -> bool:
        """Whether a plan was made with this room, or none was found."""
        stage = self._stages.get(layers)
        return self.bound(layers, room) == math.inf or (stage is not None and room in stage.found)

    def bound(self, layers: Layers, room: int) -> float:
        """(45) Seconds of a micro-batch that no plan undercuts, by what is proven of the stages inside; infinite where none was
        found to fit.
        """
        first, last = layers
        least = self._sums.training(layers)
        if room <= 0:
            return math.inf
        for (begin, end), stage in self._stages.items():
            if not first <= begin < end <= last:
                continue
            if room <= stage.too_small:
                return math.inf
            own = 0.0 if (begin, end) == layers else stage.messages_seconds
            least = max([least, *(plan.bound_seconds - own for plan in stage.valid(room))])
        return least

    def forward_bound(self, layers: Layers, room: int) -> float:
        """The same for the forward alone."""
        return self._sums.forward_alone(layers, room - self.profile.device.floor.held_bytes)

    def operators(self, layers: Layers) -> tuple[float, float, float]:
        """Seconds of the operators that run in any schedule between the message from below and the ones above: those of
        the forward alone, those of the training schedule's forward, and from there back those of its backward.
        """
        return self._sums.operators(layers)

    # --- planning --------------------------------------------------------------------------------------------------

    def plan(self, layers: Layers, room: int, time_limit: float) -> Known | None:
        """The plan of a stage with this room. Raises KeyboardInterrupt on Ctrl-C."""
        if not self.planned(layers, room):
            self._stage(layers).plan(room, time_limit, bounded=True)
        return self.best(layers, room)

    def least_room(self, layers: Layers, time_limit: float) -> int:
        """The smallest room with which a plan of the stage was found."""
        return self._stage(layers).least_room(time_limit)

    def neighbour_bytes(self, budget_bytes: int) -> int:
        """Distance to the budgets with which memory is valued."""
        return next(iter(self._stages.values())).planner.neighbour_bytes(budget_bytes)

    def common_budget(self, layers: Layers, budget_bytes: int, ahead_below: int) -> int:
        """A budget up to this one within which the fastest plan is the same, so that many members can have one plan: the largest
        that was planned for, or that a plan takes.
        """
        room, found = self.room(layers, budget_bytes, ahead_below), self._stages[layers].found
        best = self.best(layers, room)
        assert best is not None
        sizes = {size for asked, one in found.items() for size in (asked, one.plan.peak_bytes)}
        common = budget_bytes - room + max(size for size in sizes if best.plan.peak_bytes <= size <= room)
        return max(common, self.profile.device.floor.start_peak_bytes)

    def member_plan(self, layers: Layers, budget_bytes: int, ahead_below: int) -> Plan:
        """The fastest known plan as that of a member whose messages take their part of the budget."""
        if (layers, budget_bytes, ahead_below) not in self._restated:
            self._restated[layers, budget_bytes, ahead_below] = self._member_plan(layers, budget_bytes, ahead_below)
        return self._restated[layers, budget_bytes, ahead_below]

    def _member_plan(self, layers: Layers, budget_bytes: int, ahead_below: int) -> Plan:
        room = self.room(layers, budget_bytes, ahead_below)
        known = self.best(layers, room)
        assert known is not None
        profile = self._profile(layers, self.extra_bytes(layers, ahead_below))
        return self._stages[layers].restated(known.plan, room, profile, budget_bytes)

    def _profile(self, layers: Layers, extra_bytes: int) -> Profile:
        first, last = layers
        return stage_profile(
            self.profile,
            self.cuts.get(first),
            self.cuts.get(last),
            micro_batches=self.micro_batches,
            extra_bytes=extra_bytes,
            bits=self.bits,
        )

    def _stage(self, layers: Layers) -> _Stage:
        if layers not in self._stages:
            self._stages[layers] = _Stage(self._profile(layers, 0), self.gap)
        return self._stages[layers]


class _Sums:
    """Sums over neighbouring layers of what all schedules do."""

    def __init__(self, profile: Profile) -> None:
        programs = {program.name: program for program in profile.programs}
        tensors = {tensor.name: tensor for tensor in profile.tensors}
        forward, backward, inference, updates, unpacking, packed = ([0.0] for _ in range(6))
        seen: set[str] = set()
        self._unpacked_rate = 0.0
        """the most seconds of unpacking that a byte of memory saves"""
        for layer in profile.layers:
            program = programs[layer.program]
            by_phase = {"forward": 0.0, "backward": 0.0, "inference": 0.0}
            for one in program.operators:
                by_phase[one.phase] += one.seconds
            forward.append(by_phase["forward"])
            backward.append(by_phase["backward"])
            inference.append(sum(program.operators[position].seconds for position in program.inference))
            own = [tensors[name] for name in {*layer.bindings.values()} - seen if name in tensors]
            seen |= {tensor.name for tensor in own}  # what several layers use counts for the first of them
            updates.append(sum(tensor.update_seconds for tensor in own if tensor.kind == "trainable"))
            read = _read_whole(program, layer.bindings)
            whole = [tensor for tensor in own if tensor.kind == "weight" and tensor.name in read]
            unpacking.append(sum(tensor.unpack_seconds for tensor in whole))
            packed.append(float(sum(min(tensor.bytes, tensor.packed_bytes) for tensor in whole)))
            rates = [tensor.unpack_seconds / tensor.bytes for tensor in whole if tensor.bytes]
            self._unpacked_rate = max([self._unpacked_rate, *rates])
        self._forward, self._backward, self._inference, self._updates, self._unpacking, self._packed = (
            list(accumulate(one)) for one in (forward, backward, inference, updates, unpacking, packed)
        )
        self._read = profile.device.read.bytes_per_second

    def operators(self, layers: Layers) -> tuple[float, float, float]:
        """Of the forward alone, of the forward and of the backward of training."""
        return _between(self._inference, layers), _between(self._forward, layers), _between(self._backward, layers)

    def training(self, layers: Layers) -> float:
        return sum(_between(one, layers) for one in (self._forward, self._backward, self._updates))

    def forward_alone(self, layers: Layers, arena_bytes: int) -> float:
        """Operators, and the unpacking of what cannot stay unpacked; or the reading of what cannot stay in memory."""
        arena = max(0, arena_bytes)
        unpacking = max(0.0, _between(self._unpacking, layers) - arena * self._unpacked_rate)
        reading = max(0.0, _between(self._packed, layers) - arena) / self._read
        return max(_between(self._inference, layers) + unpacking, reading)


def _between(sums: Sequence[float], layers: Layers) -> float:
    first, last = layers
    return sums[last] - sums[first]


def _read_whole(program: Program, bindings: Mapping[str, str]) -> set[str]:
    """What the forward alone reads as a whole; of what is gathered, only some rows are read, from the store."""
    operators = [program.operators[position] for position in program.inference]
    return {
        bindings[value] for one in operators for value in one.inputs if value in bindings and value not in one.gathers
    }
