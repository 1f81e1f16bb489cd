"""Fleets that share out the micro-batches of a step."""

import math
import time
from collections.abc import Sequence
from typing import Any

from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.fleet_search import (
    AloneSearch,
    ChainPlace,
    Contributor,
    SumChain,
    SumSearch,
)
from tightfit.planner.fleet.kinds.frame import NOT_SHORTER, SEARCH_SHARE, StepPlanner
from tightfit.planner.fleet.members import (
    check_one_model,
    lacking,
    shared,
)
from tightfit.planner.fleet.options import FleetOptions
from tightfit.planner.fleet.part_plans import AlonePlans, MemberPlans, no_time
from tightfit.planner.fleet.part_profiles import (
    alone_profile,
    micro_batch_seconds,
    pieces_of,
    shelf_seconds,
    update_seconds,
)
from tightfit.planner.fleet.programs import shared_by_weight
from tightfit.planner.fleet.schema import Baseline, FleetPlan, Replica
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InfeasibleError

LEAST_SHARE = 0.05
"""of the time limit: to find out how much memory a member lacks"""


class SumPlanner(StepPlanner):
    """Micro-batches are shared out, and gradients added; or one member does everything."""

    kind = "data parallel"

    def __init__(self, described: DescribedFleet, asked: FleetOptions) -> None:
        super().__init__(described, asked)
        specs = self.specs
        check_one_model({spec.name: spec.profile for spec in specs})
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
        self.alone.run(self.until(1.0), needed=self.together.best is None)

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
