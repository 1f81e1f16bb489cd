"""Pipelines: fleets among which the layers of a model are divided."""

import math
import time
from collections.abc import Sequence
from typing import Any

from tightfit.planner.fleet.bounds import Candidate, Division, DivisionBounds, Held
from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.fleet_search import (
    DivisionSearch,
)
from tightfit.planner.fleet.kinds.frame import NOT_SHORTER, SEARCH_SHARE, StepPlanner
from tightfit.planner.fleet.members import (
    MemberSpec,
    check_one_model,
    checked_count,
    checked_members,
    lacking,
    shared,
    trained_tensors,
)
from tightfit.planner.fleet.options import FleetOptions
from tightfit.planner.fleet.part_plans import StagePlans, no_time, while_there_is_time
from tightfit.planner.fleet.parts import passed_of
from tightfit.planner.fleet.schema import Baseline, FleetPlan, Part, Replica
from tightfit.planner.fleet.simulate import own_layers
from tightfit.planner.problem.gradients import refuse_tables
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_seconds, format_size

BITS = (0, 8)
"""of a number in a pipeline's messages; 0: as it is"""


class PipelinePlanner(StepPlanner):
    """The model is divided: which devices hold which layers, and how far each is ahead."""

    kind = "pipeline"
    usual_gap = 1e-2

    def __init__(self, described: DescribedFleet, asked: FleetOptions) -> None:
        super().__init__(described, asked)
        self.bits = asked.bits or 0
        specs = _of_one_model(self.specs, self.bits)
        # Half of the gap is for the stages' plans, the rest for how the model is divided.
        self.candidates = candidates_of(specs, self.micro_batches, self.bits, self.gap / 2)
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
        late = time.monotonic() > search.deadline
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
        tried = [search.attempt(one) for one, _ in while_there_is_time(whole, search.deadline, always=0)]
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


def least_seconds(members: Sequence[MemberSpec], micro_batches: int, *, bits: int = 0) -> float | None:
    """Seconds that no pipeline undercuts, by the seconds of operators and links alone; None: the model cannot be cut.

    Raises InputError as the planner.
    """
    number = checked_count(micro_batches)
    candidates = candidates_of(_of_one_model(checked_members(members), bits), number, bits, gap=0.0)
    return DivisionBounds(candidates, number).least if candidates[0].plans.cuts else None


def _of_one_model(specs: Sequence[MemberSpec], bits: int) -> Sequence[MemberSpec]:
    """The same members. Raises InputError for those that cannot be a pipeline with such messages."""
    check_one_model({spec.name: spec.profile for spec in specs})
    refuse_tables(specs[0].profile, "a pipeline")
    if bits not in BITS:
        raise InputError(f"messages of {bits} bits: give 8, or 0 to send numbers as they are")
    return specs


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


def candidates_of(specs: Sequence[MemberSpec], micro_batches: int, bits: int, gap: float) -> list[Candidate]:
    made = shared([spec.profile for spec in specs], lambda one: StagePlans(one, micro_batches, bits, gap))
    return [
        Candidate(name=spec.name, plans=plans, budget_bytes=spec.budget_bytes, link=spec.link)
        for spec, plans in zip(specs, made)
    ]
