"""Plans of what members of a fleet compute, by the bytes that they may take: one planner for each part of a device
model.

A floor that is higher by the bytes of messages and shelves leaves a schedule the same **room** as a budget that is
lower by as much. The one difference is the peak of the process's start, which the floor does not change. So the
planners here plan for a process whose start has no peak, at the budget less those bytes; schedules are then stated, and
replayed, under the floor of the member. One search serves all shelves, numbers of micro-batches and budgets, and
members with equal profiles. A member that has nothing beside its plan (`AlonePlans`) is planned for as it is.

What holds for some layers holds for more: a schedule of a stage, with all that belongs to other layers left out, is one
of the layers inside it, but for the operators that send and receive. So the seconds that no plan of a stage undercuts,
less those of its messages, bound every stage that contains it; where nothing fits of it, nothing fits of them. Numbers
in brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

from tightfit.planner.fleet.clock import Marks
from tightfit.planner.fleet.part_profiles import (
    Cut,
    alone_profile,
    cuts,
    member_profile,
    micro_batch_seconds,
    shelf_seconds,
    stage_profile,
)
from tightfit.planner.fleet.parts import message_bytes, messages_bytes
from tightfit.planner.fleet.schema import Shelf
from tightfit.planner.instructions import Instruction, Run
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import answered, rebudgeted
from tightfit.planner.protocol import Planner
from tightfit.planner.schema import Phase, Plan
from tightfit.planner.simulation.plan_index import PlanIndex
from tightfit.planner.simulation.replay import Replay, Role
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.schema import Profile, Program
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.fleet.message import ring
from tightfit.runtime.engine.training.job import RECEIVE, SEND

LEAST_SECONDS = 0.1
"""time limit of a plan, at least: what is known at once of a model's schedules is found in any"""
ALWAYS = 16
"""of what is to be planned for one fleet: so much is, however short the time"""
Layers = tuple[int, int]
"""a run of layers: the first one, and the one after the last"""

T = TypeVar("T")


def no_time(what: str = "it") -> str:
    """Why something was not planned."""
    return f"there was no time to plan {what}; give {spelled('time_limit')} more"


def while_there_is_time(things: Sequence[T], until: float, always: int = ALWAYS) -> Iterator[tuple[T, float]]:
    """Each of the things to plan for with its share of the seconds that are left until `until`, on the monotonic clock;
    once that is over, of the first `always` alone. So one time limit holds for a fleet of any size.
    """
    for done, thing in enumerate(things):
        share = (until - time.monotonic()) / (len(things) - done)
        if share <= 0 and done >= always:
            return
        yield thing, share


@dataclass(frozen=True, kw_only=True)
class Known:
    """A plan that was found; a subclass keeps more of it."""

    plan: Plan


K = TypeVar("K", bound=Known)


class RoomPlans(Generic[K]):
    """Plans of a profile by the room that was asked for, with what `kept` makes of each."""

    def __init__(self, profile: Profile, gap: float, kept: Callable[[Plan], K]) -> None:
        self.planner: Planner = planner_of(profile)
        self.gap = gap
        self.found: dict[int, K] = {}
        self.too_small = 0
        """the largest room with which nothing was found"""
        self._kept = kept
        self._least: int | None = None
        """the smallest room with which something was found, once that has been looked for"""

    def planned(self, room: int) -> bool:
        return room in self.found or room <= self.too_small

    def plan(self, room: int, time_limit: float, *, bounded: bool = False) -> None:
        """Plan with this room, if that was not done; `bounded`: unless a bound says at once that nothing fits. Raises
        KeyboardInterrupt on Ctrl-C.
        """
        if self.planned(room):
            return
        limit, fits = max(LEAST_SECONDS, time_limit), True
        with suppress(TimeoutError):
            fits = not bounded or time_limit < LEAST_SECONDS or self.planner.bound(room, time_limit=limit) is not None
        made = self.planner.plan(room, time_limit=limit, gap=self.gap) if fits else None
        if made is not None and made.train is not None:
            self.found[room] = self._kept(made)
        if self.planner.interrupted:
            raise KeyboardInterrupt
        if room not in self.found:
            self.too_small = room
            self._least = made.minimum_budget_bytes if made else None

    def fitting(self, room: int) -> list[K]:
        """What is known of the plans that fit."""
        return [one for one in self.found.values() if one.plan.peak_bytes <= room]

    def valid(self, room: int) -> list[Plan]:
        """The plans whose bounds hold with `room`."""
        return [one.plan for asked, one in self.found.items() if asked >= room]

    def least_room(self, time_limit: float) -> int:
        """The smallest room with which a plan was found."""
        if self._least is None:
            self._least = self.planner.minimum_bytes(time_limit=max(LEAST_SECONDS, time_limit))
        return self._least

    def restated(self, made: Plan, room: int, profile: Profile, budget_bytes: int) -> Plan:
        """A plan that fits `room` as that of a member with a profile and a budget, with the best bounds that hold."""
        valid = self.valid(room)
        proven = made.model_copy(
            update={
                "bound_seconds": max((plan.bound_seconds for plan in valid), default=0.0),
                "any_schedule_bound_seconds": max((plan.any_schedule_bound_seconds for plan in valid), default=0.0),
            }
        )
        return restated(proven, profile, budget_bytes, asked=self.gap)


def without_start(profile: Profile) -> Profile:
    """The profile for a process whose start has no peak."""
    floor = profile.device.floor.model_copy(update={"import_peak_bytes": 0})
    return profile.model_copy(update={"device": profile.device.model_copy(update={"floor": floor})})


def restated(made: Plan, profile: Profile, budget_bytes: int, *, asked: float = 0.0) -> Plan:
    """The schedule of `made` as a plan of `profile`, which differs in floor, optimizer and seconds of updates only.

    Its bounds have to hold for that profile. `asked`: the gap at which the search for the schedule could stop.
    """
    raw = made.model_copy(
        update={
            "profile_fingerprint": profile.fingerprint,
            "budget_bytes": budget_bytes,
            "floor_bytes": profile.device.floor.held_bytes,
            "peak_bytes": 0,
            "optimizer": profile.optimizer,
            "device": profile.device,
            "tensors": profile.tensors,
        }
    )
    return answered(
        raw,
        simulate(raw),
        bound_seconds=made.bound_seconds,
        any_bound=made.any_schedule_bound_seconds,
        solve_seconds=made.solve_seconds,
        deterministic=bool(made.deterministic),
        asked=asked,
        stalled=made.ended_by == "stalled",
        interrupted=made.ended_by == "interrupt",
    )


# --- the whole model, for one of several ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _KnownMember(Known):
    seconds: dict[tuple[Shelf, bool], float]
    """by where gradients lie, and whether the member is the first of the chain"""


class MemberPlans(RoomPlans[_KnownMember]):
    """Of a device as one of several: what is known of its seconds per micro-batch, by the bytes that its plan may
    take.
    """

    def __init__(self, profile: Profile, gap: float) -> None:
        super().__init__(without_start(member_profile(profile, 1, 0, "memory")), gap, self._known)
        self.profile = profile

    def seconds(self, room: int, gradients: Shelf, *, first: bool) -> float:
        """Of the fastest known plan that fits; infinite where none is known."""
        return min((one.seconds[gradients, first] for one in self.fitting(room)), default=math.inf)

    def hoped(self, room: int, gradients: Shelf, *, first: bool) -> float:
        """Of the fastest known plan with this room or more: a plan made with this room takes as long, or longer.
        Infinite where none was found to fit.
        """
        if room <= self.too_small:
            return math.inf
        larger = [self.seconds(asked, gradients, first=first) for asked in self.found if asked >= room]
        return max(larger, default=0.0)

    def bound(self, room: int, gradients: Shelf, *, first: bool) -> float:
        """Seconds that no plan of the class undercuts; infinite where none was found to fit."""
        if room <= self.too_small:
            return math.inf
        least = max((plan.bound_seconds for plan in self.valid(room)), default=0.0)
        return max(least, shelf_seconds(self.profile, gradients, first=first))

    def _known(self, made: Plan) -> _KnownMember:
        on_disk = restated(made, member_profile(self.profile, 1, 0, "disk"), made.budget_bytes)
        seconds: dict[tuple[Shelf, bool], float] = {}
        for first in (True, False):
            seconds["memory", first] = micro_batch_seconds(made, "memory", first=first)
            seconds["disk", first] = micro_batch_seconds(on_disk, "disk", first=first)
        return _KnownMember(plan=made, seconds=seconds)

    def member_plan(
        self, budget_bytes: int, extra_bytes: int, *, micro_batches: int, gradients: Shelf, first: bool
    ) -> Plan:
        """The fastest known plan as that of a member whose exchange takes `extra_bytes`, in a step of
        `micro_batches`.
        """
        room = budget_bytes - extra_bytes
        made = min(self.fitting(room), key=lambda one: one.seconds[gradients, first]).plan
        profile = member_profile(self.profile, micro_batches, extra_bytes, gradients)
        return self.restated(made, room, profile, budget_bytes)


# --- the whole model, for one member alone ----------------------------------------------------------------------------


class AlonePlans(RoomPlans[Known]):
    """The plans of a member that has nothing beside its plan, by budgets; seconds are those of all `micro_batches` of a
    step.
    """

    def __init__(self, profile: Profile, micro_batches: int, gap: float) -> None:
        super().__init__(profile, gap, lambda made: Known(plan=made))
        self.micro_batches = micro_batches
        self._once = _Sums(profile).training((0, len(profile.layers)))
        """seconds of one run of every operator"""
        self._least_plans: dict[int, Plan] = {}
        """plans that were made for a larger budget, at the budget of their peak"""

    def known(self, budget_bytes: int) -> Plan | None:
        """The plan at a budget; where there was no time for one, the fastest other one that fits. None: none is
        known.
        """
        if budget_bytes in self.found:
            return self.found[budget_bytes].plan
        plans = [one.plan for one in self.fitting(budget_bytes)]
        fastest = min(plans, key=lambda plan: plan.step_seconds, default=None)
        if fastest is None or fastest.budget_bytes <= budget_bytes:
            return fastest
        # At the budget that it takes, so that all who have room for it can have the same.
        peak = fastest.peak_bytes
        if peak not in self._least_plans:
            self._least_plans[peak] = rebudgeted(fastest, budget_bytes=peak)
        return self._least_plans[peak]

    def makespan(self, budget_bytes: int) -> float:
        """Seconds of a step by the plan that was made at this budget; infinite where none was."""
        made = self.found.get(budget_bytes)
        return math.inf if made is None else self.micro_batches * made.plan.step_seconds

    def bound(self, budget_bytes: int) -> float:
        """Seconds that no step undercuts: those of a plan's bound at this budget or a larger one, or of one run of
        every operator.
        """
        if budget_bytes <= self.too_small:
            return math.inf
        bounds = [plan.bound_seconds for plan in self.valid(budget_bytes)]
        return self.micro_batches * max(bounds, default=self._once)


# --- some of the layers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KnownStage(Known):
    """A plan of a stage, with when its schedules reach their messages."""

    train: Marks
    forward: Marks


def _known(made: Plan) -> KnownStage:
    train, forward = marks_of(made)
    return KnownStage(plan=made, train=train, forward=forward)


class _Stage(RoomPlans[KnownStage]):
    """The plans of one stage."""

    def __init__(self, profile: Profile, gap: float) -> None:
        super().__init__(without_start(profile), gap, _known)
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

    def best(self, layers: Layers, room: int) -> KnownStage | None:
        """The fastest known plan that fits."""
        stage = self._stages.get(layers)
        fitting = stage.fitting(room) if stage else []
        return min(fitting, key=lambda one: (one.train.seconds, one.forward.seconds), default=None)

    def planned(self, layers: Layers, room: int) -> bool:
        """Whether a plan was made with this room, or none was found."""
        stage = self._stages.get(layers)
        return self.bound(layers, room) == math.inf or (stage is not None and room in stage.found)

    def bound(self, layers: Layers, room: int) -> float:
        """(45) Seconds of a micro-batch that no plan undercuts, by what is proven of the stages inside; infinite where
        none was found to fit.
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

    def plan(self, layers: Layers, room: int, time_limit: float) -> KnownStage | None:
        """The plan of a stage with this room. Raises KeyboardInterrupt on Ctrl-C."""
        if not self.planned(layers, room):
            self._stage(layers).plan(room, time_limit, bounded=True)
        return self.best(layers, room)

    def least_room(self, layers: Layers, time_limit: float) -> int:
        """The smallest room with which a plan of the stage was found."""
        return self._stage(layers).least_room(time_limit)

    def common_budget(self, layers: Layers, budget_bytes: int, ahead_below: int) -> int:
        """A budget up to this one within which the fastest plan is the same, so that many members can have one plan:
        the largest that was planned for, or that a plan takes.
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


# --- when a stage's schedule reaches its messages ---------------------------------------------------------------------


def marks_of(plan: Plan) -> tuple[Marks, Marks]:
    """The marks of a plan's training schedule, and of its forward alone. Raises InvalidSchedule where an invariant of
    the schedule breaks.
    """
    assert plan.train is not None
    assert plan.evaluate is not None
    index = PlanIndex(plan)
    return _marks(_Marked(index, plan.train, "train")), _marks(_Marked(index, plan.evaluate, "evaluate"))


def _marks(replay: _Marked) -> Marks:
    replay.run()
    return Marks(seconds=replay.now, middle=replay.middle if replay.middle is not None else replay.now, **replay.marks)


class _Marked(Replay):
    """A replay that notes when it runs the operators that send and receive."""

    def __init__(self, world: PlanIndex, phase: Phase, role: Role) -> None:
        super().__init__(world, phase, role, role)
        self.marks: dict[str, float] = {}
        self.middle: float | None = None

    def _replay(self, instruction: Instruction) -> int:
        before = self.now
        workspace = super()._replay(instruction)
        if isinstance(instruction, Run):
            operator = self.declared.layers[instruction.layer][0][instruction.operator]
            if operator.phase == "backward" and self.middle is None:
                self.middle = before
            direction = operator.kwargs.get("direction", "")
            if operator.target == RECEIVE:
                self.marks.setdefault(f"receive_{direction}", before)
            elif operator.target == SEND:
                self.marks[f"send_{direction}"] = self.now
        return workspace
