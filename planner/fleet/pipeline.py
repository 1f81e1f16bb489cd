"""The planner of pipelines: which devices hold which layers of a model, how far each is ahead, and the proof.

`plan_pipeline` searches the divisions of the model (`pipeline_search`), lets the judge (`simulate`) state the
figures of the best, and adds what it is to be compared with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from tightfit.planner.fleet.io import plan_file
from tightfit.planner.fleet.member_plans import ALWAYS, no_time, while_there_is_time
from tightfit.planner.fleet.member_profiles import check_one_model, differences
from tightfit.planner.fleet.parts import message_bytes, passed_of, passing_of
from tightfit.planner.fleet.pipeline_bounds import Candidate, Division, DivisionBounds, Held
from tightfit.planner.fleet.pipeline_search import PipelineSearch
from tightfit.planner.fleet.plan import (
    UNJUDGED,
    MemberSpec,
    checked_count,
    checked_members,
    described,
    figures_of,
    judged,
    lacking,
    report,
    shared,
)
from tightfit.planner.fleet.replay import replayed
from tightfit.planner.fleet.schema import PipelineBaseline, PipelinePlan, Price, Stage
from tightfit.planner.fleet.simulate import own_layers
from tightfit.planner.fleet.stage_plans import StagePlans
from tightfit.planner.fleet.worth import TENTH, faster, price
from tightfit.planner.problem.gradients import refuse_tables
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import Progress, checked_gap, checked_limit
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_seconds, format_size

__all__ = ["plan_pipeline"]

SEARCH_SHARE, BASELINE_SHARE = 0.7, 0.15
"""of the time limit: for divisions, and for what they are compared with; the rest is for prices, if they are asked for"""
BITS = (0, 8)
"""of a number in a message; 0: as it is"""


def plan_pipeline(
    members: Sequence[MemberSpec],
    micro_batches: int,
    *,
    bits: int = 0,
    time_limit: float = 120.0,
    gap: float = 1e-2,
    prices: bool = True,
    progress: Progress | None = None,
) -> tuple[PipelinePlan, dict[str, Plan]]:
    """The shortest step found of `micro_batches` micro-batches over a model that is cut into stages, with its proof, and
    the plans of its members by name.

    Members that cannot hold a stage, or would make the step longer, take no part; the plan says why. `bits`: 8 to send
    activations and gradients rounded to 8 bits per row, 0 as they are. The search ends once the step is proven to be
    within `gap` of the best, nothing is left to try, or `time_limit` seconds are over. With `prices` it also says what
    more memory and a faster link would bring for each member. `progress` is called with stage, incumbent, bound, gap and
    seconds. Raises InputError for members that cannot train together, a model that cannot be cut, or a number that
    cannot be used, and InfeasibleError where no division fits.
    """
    planner = _PipelinePlanner(
        _checked(members, bits),
        checked_count(micro_batches),
        bits=bits,
        time_limit=checked_limit(time_limit),
        gap=checked_gap(gap),
        progress=progress,
    )
    return planner.plan(priced=prices)


def least_seconds(members: Sequence[MemberSpec], micro_batches: int, *, bits: int = 0) -> float | None:
    """Seconds that no pipeline undercuts, by the seconds of operators and links alone; None: the model cannot be cut.

    Raises InputError as `plan_pipeline`.
    """
    candidates = _candidates(_checked(members, bits), checked_count(micro_batches), bits, gap=0.0)
    return DivisionBounds(candidates, micro_batches).least if candidates[0].plans.cuts else None


def _checked(members: Sequence[MemberSpec], bits: int) -> list[MemberSpec]:
    specs = checked_members(members)
    check_one_model({spec.name: spec.profile for spec in specs})
    refuse_tables(specs[0].profile, "a pipeline")
    checked_bits(bits)
    return specs


def checked_bits(bits: int) -> None:
    """Raise InputError for what cannot be the bits of a number in a message."""
    if bits not in BITS:
        raise InputError(f"messages of {bits} bits: give 8, or 0 to send numbers as they are")


def _candidates(specs: Sequence[MemberSpec], micro_batches: int, bits: int, gap: float) -> list[Candidate]:
    made = shared([spec.profile for spec in specs], lambda one: StagePlans(one, micro_batches, bits, gap))
    return [
        Candidate(name=spec.name, plans=plans, budget_bytes=spec.budget_bytes, link=spec.link)
        for spec, plans in zip(specs, made)
    ]


class _PipelinePlanner:
    def __init__(
        self,
        specs: Sequence[MemberSpec],
        micro_batches: int,
        *,
        bits: int,
        time_limit: float,
        gap: float,
        progress: Progress | None,
    ) -> None:
        self.specs, self.micro_batches, self.bits = specs, micro_batches, bits
        self.time_limit, self.gap, self.progress = time_limit, gap, progress
        self.started = time.monotonic()
        # Half of the gap is for the stages' plans, the rest for how the model is divided.
        self.candidates = _candidates(specs, micro_batches, bits, gap / 2)
        if not self.candidates[0].plans.cuts:
            raise InputError(
                f"{specs[0].profile.model.name} cannot be cut: there is no place between its layers with something trained on"
                f" both sides; profile it with an adapter in more layers, or plan the fleet with {spelled('kind', 'data')}"
            )
        self.search = self._search(self.candidates, self.started)

    def _search(self, candidates: Sequence[Candidate], deadline: float, *, plans: bool = True) -> PipelineSearch:
        return PipelineSearch(
            candidates=candidates,
            micro_batches=self.micro_batches,
            gap=self.gap,
            deadline=deadline,
            plans=plans,
        )

    def plan(self, *, priced: bool) -> tuple[PipelinePlan, dict[str, Plan]]:
        search, interrupted = self.search, False
        search.report = self._report
        search.deadline = self._until(SEARCH_SHARE if priced else 1 - BASELINE_SHARE)
        try:
            search.run()
        except KeyboardInterrupt:
            interrupted = True
            if search.best is None:
                raise
        if search.best is None:
            raise self._nothing_fits()
        fleet, plans = self._assembled()
        more: dict[str, Any] = {}
        try:
            more["baselines"] = [] if interrupted else self._baselines()
            if priced and not interrupted:
                more["prices"] = self._prices(fleet)
        except KeyboardInterrupt:
            pass  # the plan is what was asked for first
        return judged(fleet, plans, self.started, **more), plans

    def _until(self, share: float) -> float:
        return self.started + share * self.time_limit

    def _report(self, makespan: float, bound: float) -> None:
        report(self.progress, "cutting the model", self.started, makespan, bound)

    # --- the answer ------------------------------------------------------------------------------------------------

    def _assembled(self) -> tuple[PipelinePlan, dict[str, Plan]]:
        """The pipeline's plan with the figures of its replay, and its members' plans."""
        best = self.search.best
        assert best is not None
        stages: list[Stage] = []
        plans: dict[str, Plan] = {}
        for at, held in enumerate(best.division):
            spec = self.specs[held.candidate]
            below = best.aheads[at - 1] if at else 0
            plans[spec.name] = self.candidates[held.candidate].plans.member_plan(held.layers, spec.budget_bytes, below)
            stages.append(self._stage(held, best.aheads[at], below, plans[spec.name]))
        taking = [stage.name for stage in stages]
        idle = [
            Stage(**described(spec), reason=self._reason(at))
            for at, spec in enumerate(self.specs)
            if spec.name not in taking
        ]
        unlike = differences({spec.name: spec.profile for spec in self.specs if spec.name in taking})
        if self.bits:
            unlike.append(f"messages are rounded to {self.bits} bits")
        profile = self.specs[0].profile
        both = [
            message_bytes(passing_of(one.up), self.bits) + message_bytes(passing_of(other.down), self.bits)
            for one, other in pairwise(stages)
        ]
        fleet = PipelinePlan(
            **UNJUDGED,
            model=profile.model.name,
            micro_batches=self.micro_batches,
            batch=profile.batch,
            bits=self.bits,
            members=[*stages, *idle],
            link_bytes=[self.micro_batches * one for one in both],
            bit_identical=not unlike,
            differences=unlike,
        )
        found = replayed(fleet, plans)
        figures = figures_of(found.makespan_seconds, self.search.bound) | {"timeline": found.timeline}
        return fleet.model_copy(update=figures), plans

    def _stage(self, held: Held, ahead: int, ahead_below: int, plan: Plan) -> Stage:
        candidate = self.candidates[held.candidate]
        cuts, own = candidate.plans.cuts, own_layers(plan)
        assert plan.evaluate is not None
        return Stage(
            **described(self.specs[held.candidate]),
            plan=plan_file(candidate.name),
            plan_fingerprint=plan.fingerprint,
            first_layer=held.first,
            last_layer=held.last,
            layer_names=[own[0].name, own[-1].name],
            ahead=ahead,
            up=passed_of(cuts[held.last].up_passing) if held.last in cuts else [],
            down=passed_of(cuts[held.first].down_passing) if held.first in cuts else [],
            micro_batch_seconds=plan.step_seconds,
            forward_seconds=plan.evaluate.seconds,
            bound_seconds=plan.bound_seconds,
            peak_bytes=plan.peak_bytes,
            exchange_bytes=candidate.plans.extra_bytes(held.layers, ahead_below),
        )

    # --- members that take no part ---------------------------------------------------------------------------------

    def _reason(self, at: int) -> str:
        """Why a member takes no part."""
        one = self.candidates[at]
        start = one.plans.profile.device.floor.start_peak_bytes
        if one.budget_bytes < start:
            return f"it cannot hold a stage: it {lacking(start, one.budget_bytes)}"
        fits = any(self._may_hold(Held(at, *layers)) for layers in one.plans.smallest())
        return "a step is not shorter with it" if fits else "it cannot hold any of the stages"

    def _nothing_fits(self) -> InfeasibleError:
        """What equal parts of the model would need."""
        if self.search.stopped:
            limit = format_seconds(self.time_limit)
            return InfeasibleError(
                f"no way to cut the model was found in {limit} so that its parts fit on devices of the fleet; give"
                f" {spelled('time_limit')} more, or the devices more memory"
            )
        division = self._equal()
        needed = []
        for held in division:
            one = self.candidates[held.candidate]
            left = self.started + self.time_limit - time.monotonic()
            least = one.plans.least_room(held.layers, left / len(division)) + one.plans.extra_bytes(held.layers, 0)
            needed.append(max(least, one.plans.profile.device.floor.start_peak_bytes))
        told = "; ".join(
            f"{self.specs[held.candidate].name} {lacking(least, self.specs[held.candidate].budget_bytes)} for"
            f" {held.last - held.first} layers"
            if least > self.specs[held.candidate].budget_bytes
            else f"{self.specs[held.candidate].name} can hold {held.last - held.first} layers with {format_size(least)}"
            for held, least in zip(division, needed)
        )
        return InfeasibleError(
            f"the model cannot be cut so that every device of the fleet holds its part: of equal parts {told}; give them"
            " more memory, add a device, or profile with a smaller batch or a shorter sequence",
            max(needed),
        )

    # --- what it is compared with ----------------------------------------------------------------------------------

    def _equal(self) -> Division:
        """The model in parts of equally many layers, as far as its cuts allow, one for each member in the given order."""
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

    def _baselines(self) -> list[PipelineBaseline]:
        """The fixed ways to cut, judged like any other."""
        names = [spec.name for spec in self.specs]
        division = self._equal()
        search = self._search(self.candidates, self._until(SEARCH_SHARE + BASELINE_SHARE))
        late = len(division) > ALWAYS and time.monotonic() > search.deadline
        found = None if late else search.attempt(division)
        unfit = [names[held.candidate] for held in division if not self._may_hold(held)]
        layers = dict.fromkeys(names, 0) | {names[held.candidate]: held.last - held.first for held in division}
        equal = PipelineBaseline(
            name="equal layers",
            makespan_seconds=None if found is None else found.makespan,
            layers=layers,
            reason=None if found else no_time() if late else f"{', '.join(unfit)} cannot hold its layers",
        )
        search = self._search(self.candidates, self._until(1.0))
        bounds = DivisionBounds(self.candidates, self.micro_batches)
        whole = sorted(((Held(at, 0, self.candidates[at].plans.layers),) for at in range(len(names))), key=bounds.bound)
        tried = [search.attempt(one) for one, _ in while_there_is_time(whole, search.deadline)]
        alone = search.best
        working = dict.fromkeys(names, 0)
        if alone is not None:
            working[names[alone.division[0].candidate]] = self.candidates[0].plans.layers
        fastest = PipelineBaseline(
            name="fastest alone",
            makespan_seconds=None if alone is None else alone.makespan,
            layers=working,
            reason=None
            if alone
            else no_time()
            if len(tried) < len(whole)
            else "no device can hold a micro-batch alone",
        )
        return [equal, fastest]

    def _may_hold(self, held: Held) -> bool:
        one = self.candidates[held.candidate]
        return one.plans.bound(held.layers, one.plans.room(held.layers, one.budget_bytes, 0)) < math.inf

    def _prices(self, fleet: PipelinePlan) -> list[Price]:
        """By how much a step gets shorter if one of the members has more memory, or a faster link: with the same cuts, or
        with others that were tried.
        """
        assert self.search.best is not None
        result: list[Price] = []
        for held, _ in while_there_is_time(self.search.best.division, self._until(1.0), always=0):
            at = held.candidate
            one = self.candidates[at]
            more = min(one.plans.neighbour_bytes(one.budget_bytes), one.budget_bytes // TENTH)
            roomier = self._with(at, replace(one, budget_bytes=one.budget_bytes + more), plans=True)
            faster_link = self._with(at, replace(one, link=faster(one.link)), plans=False)
            result.append(price(one.name, more, fleet.makespan_seconds, with_memory=roomier, with_link=faster_link))
        return result

    def _with(self, at: int, changed: Candidate, *, plans: bool) -> float:
        """The makespan with one candidate changed: with `plans` by the same cuts, which are planned for; else by the best
        of those that were tried.
        """
        assert self.search.best is not None
        candidates = [*self.candidates[:at], changed, *self.candidates[at + 1 :]]
        search = self._search(candidates, self._until(1.0), plans=plans)
        found = search.choose(self.search.best.division).makespan
        for division in () if plans else sorted(self.search.tried):
            if time.monotonic() < search.deadline:
                found = min(found, search.choose(division).makespan)
        return found
