"""The planner of steps: which devices take part in one, what each computes and holds, and the proof.

Data parallel, a pipeline and mobillm are three fillings of one frame (`_StepPlanner`): something is searched
(`search`), until nothing is left to try, the time is over or Ctrl-C is pressed; the judge (`simulate`) states the
figures of the best; then comes what it is to be compared with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from tightfit.planner.fleet.bounds import Candidate, Division, DivisionBounds, Held
from tightfit.planner.fleet.fleet_search import (
    AloneSearch,
    ChainPlace,
    Contributor,
    DivisionSearch,
    SumChain,
    SumSearch,
)
from tightfit.planner.fleet.io import sealed_fleet
from tightfit.planner.fleet.members import (
    MemberSpec,
    check_one_model,
    check_side,
    checked_count,
    checked_members,
    differences,
    lacking,
    shared,
    trained_tensors,
)
from tightfit.planner.fleet.options import FleetOptions, FleetPlanOptions, PipelineOptions, SharedBatchesOptions
from tightfit.planner.fleet.part_plans import ALWAYS, AlonePlans, MemberPlans, StagePlans, no_time, while_there_is_time
from tightfit.planner.fleet.part_profiles import (
    alone_profile,
    micro_batch_seconds,
    pieces_of,
    received_tensors,
    server_profile,
    shelf_seconds,
    side_shape,
    update_seconds,
)
from tightfit.planner.fleet.parts import RINGS, message_bytes, messages_bytes, passed_of
from tightfit.planner.fleet.programs import shared_by_weight
from tightfit.planner.fleet.replay import one_way, replayed
from tightfit.planner.fleet.schema import Baseline, FleetPlan, Kind, Member, Part, Replica
from tightfit.planner.fleet.simulate import own_layers, simulate_fleet
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import gap_to, sealed
from tightfit.planner.problem.device_forward import DEFAULT_BITS, device_forward
from tightfit.planner.problem.gradients import refuse_tables
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import Gap
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.schema import MOBILLM, Profile
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_seconds, format_size

__all__ = ["MemberSpec", "least_seconds", "plan_fleet", "plan_kind", "plan_pipeline", "plan_side"]

SEARCH_SHARE = 0.85
"""of the time limit: for the chains of data parallel, or the divisions of a pipeline; the rest is for one device alone,
and for what is compared with the plan
"""
SIDE_SHARES = (0.4, 0.3, 0.3)
"""of the time limit: for the plan of mobillm's device, of its server, and of the device without a server"""
LEAST_SHARE = 0.05
"""of the time limit: to find out how much memory a member lacks"""
FIRST_SHARE = 0.5
"""of the time limit: for the data-parallel plan, where a pipeline may have to be planned too"""
BITS = (0, 8)
"""of a number in a pipeline's messages; 0: as it is"""
NOT_SHORTER = "a step is not shorter with it"


class SideOptions(FleetPlanOptions):
    """Of mobillm."""

    gap: Gap = 1e-3
    bits: int = DEFAULT_BITS


# --- what is asked for ------------------------------------------------------------------------------------------------


@keywords_of(SharedBatchesOptions)
def plan_fleet(
    members: Sequence[MemberSpec], micro_batches: int, asked: SharedBatchesOptions
) -> tuple[FleetPlan, dict[str, Plan]]:
    """The shortest step found of `micro_batches` micro-batches, with its proof, and the plans of its members by name.

    Members that cannot hold a micro-batch, or would not make the step shorter, take no part; the plan says why. The
    search ends once the step is proven to be within `gap` of the best, nothing is left to try, or `time_limit` seconds
    are over. `progress` is called with stage, incumbent, bound, gap and seconds. Raises InputError for members that
    cannot train together, or a number that cannot be used, and InfeasibleError where no device can hold a micro-batch.
    """
    return _SumPlanner(_of_one_model(members), micro_batches, asked).plan()


@keywords_of(PipelineOptions)
def plan_pipeline(
    members: Sequence[MemberSpec], micro_batches: int, asked: PipelineOptions
) -> tuple[FleetPlan, dict[str, Plan]]:
    """The same over a model that is cut into stages. `bits`: 8 to send activations and gradients rounded to 8 bits per
    row, 0 as they are. Raises InputError for a model that cannot be cut too, and InfeasibleError where no division
    fits.
    """
    return _PipelinePlanner(_of_one_model(members, asked.bits), micro_batches, asked).plan()


@keywords_of(SideOptions)
def plan_side(
    members: Sequence[MemberSpec], micro_batches: int, asked: SideOptions
) -> tuple[FleetPlan, dict[str, Plan]]:
    """The plan of a step of `micro_batches` micro-batches, with its proof, and the plans of both members by name.

    `members`: the device with its profile of the model, and the server with its profile of the side network, in this
    order. `bits`: 8 or 4 to round activations, 0 to send them as they are. `progress` is the planner's own. Raises
    InputError for members that cannot train together or a number that cannot be used, InfeasibleError where a part does
    not fit.
    """
    specs = checked_members(members)
    if len(specs) != 2:
        raise InputError(
            f"{MOBILLM} is for two members, a device and a server after it, and {len(specs)} are described;"
            " describe two"
        )
    return _SidePlanner(specs, micro_batches, asked).plan()


@keywords_of(FleetOptions)
def plan_kind(
    members: Sequence[MemberSpec], micro_batches: int, asked: FleetOptions
) -> tuple[FleetPlan, dict[str, Plan], str | None]:
    """The plan of a fleet and those of its members, as `plan_fleet` or `plan_pipeline` make them, and why it is of this
    kind where that was left open.

    Raises as these do, and InputError for a kind that is none, and for `bits` where nothing passes over a cut.
    """
    kind, bits, limit = asked.kind, asked.bits, asked.time_limit
    options: dict[str, Any] = {"progress": asked.progress}
    options |= {} if asked.gap is None else {"gap": asked.gap}
    if kind == "data":
        return *plan_fleet(members, micro_batches, time_limit=limit, **options), None
    if kind == "pipeline":
        return *plan_pipeline(members, micro_batches, bits=bits, time_limit=limit, **options), None
    started = time.monotonic()
    least = least_seconds(members, micro_batches, bits=bits)
    data: FleetPlan | None = None
    plans: dict[str, Plan] = {}
    try:
        share = FIRST_SHARE if least is not None else 1.0
        data, plans = plan_fleet(members, micro_batches, time_limit=share * limit, **options)
    except InfeasibleError:
        if least is None:
            raise
    alone = "" if data is None else f"data parallel ({format_seconds(data.makespan_seconds)})"
    if data is not None and least is None:
        return data, plans, "data parallel: the model cannot be cut"
    if data is not None and least is not None and least >= data.makespan_seconds:
        return data, plans, f"{alone}: no pipeline takes less than {format_seconds(least)}"
    try:
        left = max(1.0, limit - (time.monotonic() - started))
        pipeline, stages = plan_pipeline(members, micro_batches, bits=bits, time_limit=left, **options)
    except InfeasibleError:
        if data is None:
            raise
        return data, plans, f"{alone}: no pipeline was found that the devices can hold"
    if data is None:
        return pipeline, stages, "a pipeline: no device can hold a micro-batch of the whole model"
    takes = format_seconds(pipeline.makespan_seconds)
    if pipeline.makespan_seconds < data.makespan_seconds and len(pipeline.names) > 1:
        return pipeline, stages, f"a pipeline ({takes}): shorter than {alone}"
    return data, plans, f"{alone}: the best pipeline found takes {takes}"


def least_seconds(members: Sequence[MemberSpec], micro_batches: int, *, bits: int = 0) -> float | None:
    """Seconds that no pipeline undercuts, by the seconds of operators and links alone; None: the model cannot be cut.

    Raises InputError as `plan_pipeline`.
    """
    number = checked_count(micro_batches)
    candidates = _candidates(_of_one_model(members, bits), number, bits, gap=0.0)
    return DivisionBounds(candidates, number).least if candidates[0].plans.cuts else None


def _of_one_model(members: Sequence[MemberSpec], bits: int | None = None) -> list[MemberSpec]:
    """The members, checked; with `bits` those of a pipeline."""
    specs = checked_members(members)
    check_one_model({spec.name: spec.profile for spec in specs})
    if bits is not None:
        refuse_tables(specs[0].profile, "a pipeline")
        if bits not in BITS:
            raise InputError(f"messages of {bits} bits: give 8, or 0 to send numbers as they are")
    return specs


# --- the frame --------------------------------------------------------------------------------------------------------


class FleetPlanner:
    """What planners of steps and of rounds share: the time that they have, and how a plan is stated and sealed."""

    kind: ClassVar[Kind]
    accumulate: int
    """micro-batches of an update"""
    micro_batches: int
    """of a step, or a round"""
    aside_bytes: int = 0
    """of each device's budget: for processes beside the run"""

    def __init__(self, specs: Sequence[MemberSpec], asked: FleetPlanOptions, gap: float) -> None:
        self.specs, self.names = specs, [spec.name for spec in specs]
        self.asked, self.gap = asked, gap
        self.started = time.monotonic()

    def until(self, share: float) -> float:
        return self.started + share * self.asked.time_limit

    def report(self, stage: str, makespan: float = math.inf, bound: float = 0.0) -> None:
        """Say how far the search is; the makespan is infinite where there is none yet."""
        if self.asked.progress is not None:
            figures = {"incumbent": makespan, "bound": bound, "seconds": time.monotonic() - self.started}
            gap = 1.0 if makespan == math.inf else gap_to(makespan, bound)
            self.asked.progress({"stage": stage, "gap": gap, **figures})

    def member(self, at: int, reason: str | None = None) -> Member:
        """A device as the plan states it; `reason`: why it takes no part."""
        spec = self.specs[at]
        return Member(
            name=spec.name,
            device=spec.profile.device.name,
            measured=spec.profile.device.measured,
            budget_bytes=spec.budget_bytes,
            link=spec.link,
            aside_bytes=self.aside_bytes,
            reason=reason,
        )

    def part(self, at: int, plan: Plan, /, **fields: Any) -> Part:
        """What a device computes by this plan."""
        figures: dict[str, Any] = {
            "member": self.names[at],
            "plan": self.names[at],
            "plan_fingerprint": plan.fingerprint,
            "peak_bytes": plan.peak_bytes + self.aside_bytes,
            "micro_batch_seconds": plan.step_seconds,
            "bound_seconds": plan.bound_seconds,
        }
        return Part(**figures | fields)

    def stated(self, replicas: Sequence[Replica], reason: Callable[[int], str], **fields: Any) -> FleetPlan:
        """The plan of these replicas, with the members that take part in their order, then the others, each with its
        `reason`; not sealed yet.
        """
        taking = dict.fromkeys(
            part.member for replica in replicas for part in replica.parts if part.member in self.names
        )
        members = [self.member(self.names.index(name)) for name in taking]
        members += [self.member(at, reason(at)) for at, name in enumerate(self.names) if name not in taking]
        profile = self.specs[0].profile
        figures: dict[str, Any] = {
            "fingerprint": "",
            "kind": self.kind,
            "model": profile.model.name,
            "batch": profile.batch,
            "micro_batches": self.micro_batches,
            "accumulate": self.accumulate,
            "makespan_seconds": 0.0,
            "bound_seconds": 0.0,
            "gap": 0.0,
            "solve_seconds": 0.0,
        }
        return FleetPlan(members=members, replicas=list(replicas), **figures | fields)

    def exactness(self, profiles: Mapping[str, Profile], rounded: Sequence[str] = ()) -> dict[str, Any]:
        """Whether results are the same to the bit on devices with these profiles, where messages are not `rounded`."""
        unlike = [*differences(profiles), *rounded]
        return {"bit_identical": not unlike, "differences": unlike}

    def judged(self, fleet: FleetPlan, plans: Mapping[str, Plan], **fields: Any) -> FleetPlan:
        """The fleet's plan with these `fields` and the seconds that it took, sealed, and found to be valid."""
        fleet = sealed_fleet(fleet.model_copy(update={**fields, "solve_seconds": time.monotonic() - self.started}))
        simulate_fleet(fleet, plans)
        return fleet


def figures_of(makespan: float, bound: float) -> dict[str, Any]:
    """What a plan says of the seconds of a step or a round, where nothing takes less than `bound`."""
    bound = min(bound, makespan)
    return {"makespan_seconds": makespan, "bound_seconds": bound, "gap": gap_to(makespan, bound)}


class _StepPlanner(FleetPlanner):
    """A filling says what is searched, what the replicas of the best are, and what it is compared with."""

    def __init__(
        self,
        specs: Sequence[MemberSpec],
        micro_batches: int,
        asked: SharedBatchesOptions | PipelineOptions | SideOptions,
    ) -> None:
        self.micro_batches = self.accumulate = checked_count(micro_batches)
        super().__init__(specs, asked, asked.gap)

    def plan(self) -> tuple[FleetPlan, dict[str, Plan]]:
        interrupted = False
        try:
            self.search()
        except KeyboardInterrupt:
            interrupted = True
        if not self.fits:
            if interrupted:
                raise KeyboardInterrupt
            raise self.nothing_fits()
        replicas, plans = self.replicas()
        fleet = self.stated(replicas, self.reason, **self.fields(replicas))
        simulation = replayed(fleet, plans)
        figures = figures_of(simulation.makespan_seconds, self.bound(fleet))
        fleet = fleet.model_copy(update=vars(simulation) | figures)
        compared: list[Baseline] = []
        with suppress(KeyboardInterrupt):  # the plan is what was asked for first
            compared = self.compared(interrupted=interrupted)
        return self.judged(fleet, plans, baselines=compared), plans

    def taking(self, replicas: Sequence[Replica]) -> dict[str, Profile]:
        """The profiles of the members that take part."""
        names = {part.member for replica in replicas for part in replica.parts}
        return {spec.name: spec.profile for spec in self.specs if spec.name in names}

    # --- what a filling says ----------------------------------------------------------------------------------------

    @property
    def fits(self) -> bool:
        """Whether anything that fits was found."""
        raise NotImplementedError

    def search(self) -> None:
        """Search; Ctrl-C may end it."""
        raise NotImplementedError

    def replicas(self) -> tuple[list[Replica], dict[str, Plan]]:
        """The replicas of the best, and the plans of their parts."""
        raise NotImplementedError

    def fields(self, replicas: Sequence[Replica]) -> dict[str, Any]:
        """What plans of this kind say beside what all say."""
        raise NotImplementedError

    def bound(self, fleet: FleetPlan) -> float:
        """No way to share the work takes less."""
        raise NotImplementedError

    def reason(self, at: int) -> str:
        """Why a member takes no part."""
        raise NotImplementedError

    def nothing_fits(self) -> InfeasibleError:
        raise NotImplementedError

    def compared(self, *, interrupted: bool) -> list[Baseline]:
        """Fixed ways to share the work, judged like any other."""
        raise NotImplementedError


# --- data parallel ----------------------------------------------------------------------------------------------------


class _SumPlanner(_StepPlanner):
    """Micro-batches are shared out, and gradients added; or one member does everything."""

    kind = "data parallel"

    def __init__(self, specs: Sequence[MemberSpec], micro_batches: int, asked: SharedBatchesOptions) -> None:
        super().__init__(specs, micro_batches, asked)
        self.pieces = pieces_of(specs[0].profile)
        profiles = [spec.profile for spec in specs]
        several = len(specs) > 1 and self.micro_batches > 1
        # Half of the gap is for the members' plans, the rest for their allotment.
        half = self.gap / 2
        self.speeds = shared(profiles, lambda one: MemberPlans(one, half)) if several else []
        contributors = [
            Contributor(
                name=spec.name,
                link=spec.link,
                budget_bytes=spec.budget_bytes,
                device=spec.profile.device,
                update_seconds=update_seconds(spec.profile),
                speed=speed,
            )
            for spec, speed in zip(specs, self.speeds)
        ]
        self.together = SumSearch(
            candidates=contributors,
            pieces=self.pieces,
            micro_batches=self.micro_batches,
            gap=self.gap,
            deadline=self.started,
            report=lambda makespan, bound: self.report("sharing out micro-batches", makespan, bound),
        )
        count = self.micro_batches
        self.alone = AloneSearch(
            plans=shared(profiles, lambda one: AlonePlans(alone_profile(one, count), count, half)),
            budgets=[spec.budget_bytes for spec in specs],
        )

    @property
    def fits(self) -> bool:
        return min(self.together.makespan(self.together.best), self.alone.makespan) < math.inf

    def search(self) -> None:
        self.together.deadline = self.until(SEARCH_SHARE)
        self.together.run()
        self.alone.run(self.until(1.0))

    def bound(self, fleet: FleetPlan) -> float:
        return min(self.together.bound, self.alone.bound)

    def fields(self, replicas: Sequence[Replica]) -> dict[str, Any]:
        return self.exactness(self.taking(replicas)) | {"trained_bytes": sum(self.pieces)}

    def replicas(self) -> tuple[list[Replica], dict[str, Plan]]:
        self.together.prove()
        if self.together.makespan(self.together.best) > self.alone.makespan:
            return self._single()
        assert self.together.best is not None
        replicas: list[Replica] = []
        plans: dict[str, Plan] = {}
        following = 0
        for at, place in enumerate(self.together.best):
            first, gradients = not at, place.gradients
            spec = self.specs[place.candidate]
            extra = self.together.extra_bytes(place, first=first)
            plan = self.speeds[place.candidate].member_plan(
                spec.budget_bytes, extra, micro_batches=self.micro_batches, gradients=gradients, first=first
            )
            plans[spec.name] = plan
            part = self.part(
                place.candidate,
                plan,
                micro_batch_seconds=micro_batch_seconds(plan, gradients, first=first),
                bound_seconds=max(plan.bound_seconds, shelf_seconds(plan, gradients, first=first)),
                exchange_bytes=extra,
            )
            replicas.append(
                Replica(
                    parts=[part],
                    first=following,
                    micro_batches=place.micro_batches,
                    gradients=gradients,
                    states=place.states,
                    update_seconds=update_seconds(spec.profile),
                )
            )
            following += place.micro_batches
        return replicas, plans

    def _single(self) -> tuple[list[Replica], dict[str, Plan]]:
        """The one member that does everything, where that is the shortest step."""
        at = self.alone.best
        assert at is not None
        plan = self.alone.plans[at].found[self.specs[at].budget_bytes].plan
        replica = Replica(
            parts=[self.part(at, plan)], micro_batches=self.micro_batches, gradients="memory", states="memory"
        )
        return [replica], {self.names[at]: plan}

    # --- members that take no part ---------------------------------------------------------------------------------

    def reason(self, at: int) -> str:
        if time.monotonic() > self.until(1.0) and self.together.candidates:
            return NOT_SHORTER if self.speeds[at].planned(self.together.lean(at)) else no_time()
        needed, allowed = self._needed(at), self.specs[at].budget_bytes
        return NOT_SHORTER if needed <= allowed else f"it cannot hold a micro-batch: it {lacking(needed, allowed)}"

    def _needed(self, at: int) -> int:
        """The smallest budget found with which a member can take part in a chain; where there can be none, alone."""
        budget = self.specs[at].budget_bytes
        start = self.specs[at].profile.device.floor.start_peak_bytes
        least = LEAST_SHARE * self.asked.time_limit
        if not self.together.candidates:
            own = self.alone.plans[at]
            own.plan(budget, least)
            made = own.known(budget)
            return own.least_room(least) if made is None else made.peak_bytes
        room = self.together.lean(at)
        if self.speeds[at].seconds(room, "disk", first=False) < math.inf:
            return start
        return max(start, budget - room + self.speeds[at].least_room(least))

    def nothing_fits(self) -> InfeasibleError:
        needed = [self._needed(at) for at in range(len(self.specs))]
        told = "; ".join(f"{spec.name} {lacking(least, spec.budget_bytes)}" for spec, least in zip(self.specs, needed))
        return InfeasibleError(
            f"no device of the fleet can hold a micro-batch: {told}; give one of them more memory, or profile with a"
            " smaller batch or a shorter sequence",
            min(needed),
        )

    # --- what it is compared with ----------------------------------------------------------------------------------

    def compared(self, *, interrupted: bool) -> list[Baseline]:
        names, count, search, alone = self.names, self.micro_batches, self.together, self.alone
        shares = shared_by_weight([1.0] * len(names), count)
        equal = Baseline(name="equal shares", makespan_seconds=None, shares=dict(zip(names, shares)))
        taking = [at for at, share in enumerate(shares) if share]
        if len(taking) == 1:
            (only,) = unfit = taking
            alone.plans[only].plan(alone.budgets[only], self.until(1.0) - time.monotonic())
            makespan = alone.plans[only].makespan(alone.budgets[only])
        else:
            makespan = self._best_shelves(tuple(ChainPlace(at, shares[at], "disk", "disk") for at in taking))
            fitting = search.fitting()
            unfit = [at for at in taking if at not in fitting]
        if makespan < math.inf:
            equal = equal.model_copy(update={"makespan_seconds": makespan})
        else:
            told = ", ".join(names[at] for at in unfit)
            equal = equal.model_copy(update={"reason": f"{told} cannot hold a micro-batch"})
        working, reason = dict.fromkeys(names, 0), None
        if alone.best is not None:
            working[names[alone.best]] = count
        elif alone.bound == math.inf:
            reason = "no device can hold a micro-batch alone"
        else:
            reason = "it was not planned before the search was ended"
        makespan_alone = None if alone.best is None else alone.makespan
        fastest = Baseline(name="fastest alone", makespan_seconds=makespan_alone, shares=working, reason=reason)
        return [equal, fastest]

    def _best_shelves(self, chain: SumChain) -> float:
        """The makespan of a chain with the best shelves among those that are known to fit, as far as there is time to
        look.
        """
        search = self.together
        best = search.makespan(chain)
        while True:
            better = chain
            for other in search.shelves(chain):
                if time.monotonic() > self.until(1.0):
                    return best
                if (makespan := search.makespan(other, best)) < best:
                    best, better = makespan, other
            if better is chain:
                return best
            chain = better


# --- a pipeline -------------------------------------------------------------------------------------------------------


class _PipelinePlanner(_StepPlanner):
    """The model is divided: which devices hold which layers, and how far each is ahead."""

    kind = "pipeline"

    def __init__(self, specs: Sequence[MemberSpec], micro_batches: int, asked: PipelineOptions) -> None:
        super().__init__(specs, micro_batches, asked)
        bits = self.bits = asked.bits
        # Half of the gap is for the stages' plans, the rest for how the model is divided.
        self.candidates = _candidates(specs, self.micro_batches, bits, self.gap / 2)
        if not self.candidates[0].plans.cuts:
            raise InputError(
                f"{specs[0].profile.model.name} cannot be cut: there is no place between its layers with something"
                " trained on both sides; profile it with an adapter in more layers, or plan the fleet with"
                f" {spelled('kind', 'data')}"
            )
        self.divisions = self._division_search(self.started)
        self.divisions.report = lambda makespan, bound: self.report("cutting the model", makespan, bound)

    def _division_search(self, deadline: float) -> DivisionSearch:
        return DivisionSearch(
            candidates=self.candidates, micro_batches=self.micro_batches, gap=self.gap, deadline=deadline
        )

    @property
    def fits(self) -> bool:
        return self.divisions.best is not None

    def search(self) -> None:
        self.divisions.deadline = self.until(SEARCH_SHARE)
        self.divisions.run()

    def bound(self, fleet: FleetPlan) -> float:
        return self.divisions.bound

    def fields(self, replicas: Sequence[Replica]) -> dict[str, Any]:
        rounded = [f"messages are rounded to {self.bits} bits"] if self.bits else []
        trained = sum(tensor.bytes for tensor in trained_tensors(self.specs[0].profile))
        return self.exactness(self.taking(replicas), rounded) | {"bits": self.bits, "trained_bytes": trained}

    def replicas(self) -> tuple[list[Replica], dict[str, Plan]]:
        best = self.divisions.best
        assert best is not None
        stages: list[Part] = []
        plans: dict[str, Plan] = {}
        for at, held in enumerate(best.division):
            spec, own = self.specs[held.candidate], self.candidates[held.candidate].plans
            below = best.aheads[at - 1] if at else 0
            plan = plans[spec.name] = own.member_plan(held.layers, spec.budget_bytes, below)
            stages.append(self.part(held.candidate, plan, **stage_fields(own, held, plan, best.aheads[at], below)))
        return [Replica(parts=stages, micro_batches=self.micro_batches)], plans

    # --- members that take no part ---------------------------------------------------------------------------------

    def reason(self, at: int) -> str:
        one = self.candidates[at]
        start = one.plans.profile.device.floor.start_peak_bytes
        if one.budget_bytes < start:
            return f"it cannot hold a stage: it {lacking(start, one.budget_bytes)}"
        fits = any(self._may_hold(Held(at, *layers)) for layers in one.plans.smallest())
        return NOT_SHORTER if fits else "it cannot hold any of the stages"

    def nothing_fits(self) -> InfeasibleError:
        """What equal parts of the model would need."""
        if self.divisions.stopped:
            limit = format_seconds(self.asked.time_limit)
            return InfeasibleError(
                f"no way to cut the model was found in {limit} so that its parts fit on devices of the fleet; give"
                f" {spelled('time_limit')} more, or the devices more memory"
            )
        division = self._equal()
        told: list[str] = []
        needed: list[int] = []
        for held in division:
            one, count = self.candidates[held.candidate], held.last - held.first
            left = self.until(1.0) - time.monotonic()
            least = one.plans.least_room(held.layers, left / len(division)) + one.plans.extra_bytes(held.layers, 0)
            needed.append(max(least, one.plans.profile.device.floor.start_peak_bytes))
            told.append(
                f"{one.name} {lacking(needed[-1], one.budget_bytes)} for {count} layers"
                if needed[-1] > one.budget_bytes
                else f"{one.name} can hold {count} layers with {format_size(needed[-1])}"
            )
        return InfeasibleError(
            "the model cannot be cut so that every device of the fleet holds its part: of equal parts"
            f" {'; '.join(told)}; give them more memory, add a device, or profile with a smaller batch or a shorter"
            " sequence",
            max(needed),
        )

    def _may_hold(self, held: Held) -> bool:
        one = self.candidates[held.candidate]
        return one.plans.bound(held.layers, one.plans.room(held.layers, one.budget_bytes, 0)) < math.inf

    # --- what it is compared with ----------------------------------------------------------------------------------

    def _equal(self) -> Division:
        """The model in parts of equally many layers, as far as its cuts allow, one for each member in the given
        order.
        """
        plans = self.candidates[0].plans
        places, count = sorted(plans.cuts), min(len(self.specs), len(plans.cuts) + 1)
        chosen: list[int] = []
        for number in range(1, count):
            wanted = number * plans.layers / count
            left = [place for place in places if not chosen or place > chosen[-1]]
            usable = left[: len(left) - (count - 1 - number)]  # one is left for each cut that follows
            chosen.append(min(usable, key=lambda place: abs(place - wanted)))
        ends = [0, *chosen, plans.layers]
        return tuple(Held(at, ends[at], ends[at + 1]) for at in range(count))

    def compared(self, *, interrupted: bool) -> list[Baseline]:
        if interrupted:
            return []
        names, layers = self.names, self.candidates[0].plans.layers
        division = self._equal()
        search = self._division_search(self.until((1 + SEARCH_SHARE) / 2))
        late = len(division) > ALWAYS and time.monotonic() > search.deadline
        made = None if late else search.attempt(division)
        unfit = [names[held.candidate] for held in division if not self._may_hold(held)]
        equal = Baseline(
            name="equal layers",
            makespan_seconds=None if made is None else made.makespan,
            shares=dict.fromkeys(names, 0) | {names[held.candidate]: held.last - held.first for held in division},
            reason=None if made else no_time() if late else f"{', '.join(unfit)} cannot hold its layers",
        )
        search = self._division_search(self.until(1.0))
        bounds = DivisionBounds(self.candidates, self.micro_batches)
        whole = sorted(((Held(at, 0, layers),) for at in range(len(names))), key=bounds.bound)
        tried = [search.attempt(one) for one, _ in while_there_is_time(whole, search.deadline)]
        alone, working, reason = search.best, dict.fromkeys(names, 0), None
        if alone is not None:
            working[names[alone.division[0].candidate]] = layers
        else:
            reason = no_time() if len(tried) < len(whole) else "no device can hold a micro-batch alone"
        fastest = Baseline(
            name="fastest alone",
            makespan_seconds=None if alone is None else alone.makespan,
            shares=working,
            reason=reason,
        )
        return [equal, fastest]


def stage_fields(plans: StagePlans, held: Held, plan: Plan, ahead: int, ahead_below: int) -> dict[str, Any]:
    """What is stated of a part that holds some of the layers, by this plan."""
    layers = own_layers(plan)
    assert plan.evaluate is not None
    return {
        "layers": list(held.layers),
        "layer_names": [layers[0].name, layers[-1].name],
        "ahead": ahead,
        "up": passed_of(plans.cuts[held.last].up_passing) if held.last in plans.cuts else [],
        "down": passed_of(plans.cuts[held.first].down_passing) if held.first in plans.cuts else [],
        "forward_seconds": plan.evaluate.seconds,
        "exchange_bytes": plans.extra_bytes(held.layers, ahead_below),
    }


def _candidates(specs: Sequence[MemberSpec], micro_batches: int, bits: int, gap: float) -> list[Candidate]:
    made = shared([spec.profile for spec in specs], lambda one: StagePlans(one, micro_batches, bits, gap))
    return [
        Candidate(name=spec.name, plans=plans, budget_bytes=spec.budget_bytes, link=spec.link)
        for spec, plans in zip(specs, made)
    ]


# --- mobillm ----------------------------------------------------------------------------------------------------------


class _SidePlanner(_StepPlanner):
    """A device and a server that train a side network. Both are planned for themselves, each as fast as its budget
    allows: whatever order messages take, a step is the shorter the faster either part is.
    """

    kind = "mobillm"

    def __init__(self, specs: Sequence[MemberSpec], micro_batches: int, asked: SideOptions) -> None:
        super().__init__(specs, micro_batches, asked)
        bits = self.bits = asked.bits
        device, server = specs
        self.side = side_shape(server.profile)
        check_side(device, server)
        count = self.micro_batches
        self.profiles = (
            device_forward(device.profile, self.side.blocks, bits, micro_batches=count),
            server_profile(server.profile, micro_batches=count, bits=bits),
            alone_profile(device.profile, count),
        )
        """of the device, the server, and the device without a server"""
        self.passing = received_tensors(server.profile)
        self.plans: list[Plan] = []

    @property
    def fits(self) -> bool:
        return bool(self.plans)

    def search(self) -> None:
        made: list[Plan] = []
        for profile, spec, share in zip(self.profiles, (*self.specs, self.specs[0]), SIDE_SHARES):
            part = len(made) < len(self.specs)
            options: dict[str, Any] = {"progress": self.asked.progress} if part else {}
            plan = planner_of(profile).plan(
                spec.budget_bytes, time_limit=share * self.asked.time_limit, gap=self.gap, **options
            )
            if part and plan.train is None:
                raise InfeasibleError(
                    f"member {spec.name!r}: its part does not fit {format_size(spec.budget_bytes)};"
                    f" {format_size(plan.minimum_budget_bytes or 0, round_up=True)} would do",
                    plan.minimum_budget_bytes,
                )
            made.append(sealed(plan.model_copy(update={"policy": MOBILLM})) if part else plan)
        self.plans = made

    def replicas(self) -> tuple[list[Replica], dict[str, Plan]]:
        size = message_bytes(self.passing, self.bits)
        plans = dict(zip(self.names, self.plans))
        passes: tuple[dict[str, int], ...] = ({"to_above": size}, {"from_below": size, "buffers": RINGS})
        parts = [
            self.part(
                at,
                plan,
                exchange_bytes=messages_bytes(plan.device.floor, **passes[at]),
                up=[] if at else passed_of(self.passing),
            )
            for at, plan in enumerate(plans.values())
        ]
        return [Replica(parts=parts, micro_batches=self.micro_batches)], plans

    def fields(self, replicas: Sequence[Replica]) -> dict[str, Any]:
        trained = sum(tensor.bytes for tensor in trained_tensors(self.specs[1].profile))
        return {
            "bits": self.bits,
            "blocks": list(self.side.blocks),
            "rank": self.side.rank,
            "trained_bytes": trained,
        }

    def bound(self, fleet: FleetPlan) -> float:
        return one_way(fleet, bounds=True).least_seconds(self.micro_batches)

    def compared(self, *, interrupted: bool) -> list[Baseline]:
        """A step of backpropagation of the device alone, within its budget."""
        alone, name = self.plans[-1], self.names[0]
        makespan = None if alone.train is None else self.micro_batches * alone.step_seconds
        return [Baseline(name="device alone", makespan_seconds=makespan, shares={name: self.micro_batches})]
