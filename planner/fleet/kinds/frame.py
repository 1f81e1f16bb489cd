"""What planners of all kinds of fleets share, and those whose devices meet at every step.

Something is searched (`search`), until nothing is left to try, the time is over or Ctrl-C is pressed; the judge
(`simulate`) states the figures of the best; then comes what it is to be compared with.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.io import sealed_fleet
from tightfit.planner.fleet.members import (
    checked_count,
    checked_members,
    differences,
)
from tightfit.planner.fleet.options import FleetOptions
from tightfit.planner.fleet.replay import replayed
from tightfit.planner.fleet.schema import Baseline, FleetPlan, Kind, Member, Part, Replica
from tightfit.planner.fleet.simulate import simulate_fleet
from tightfit.planner.plan_result import gap_to
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InfeasibleError

SEARCH_SHARE = 0.85
"""of the time limit: for the chains of data parallel, or the divisions of a pipeline; the rest is for one device alone,
and for what is compared with the plan
"""
NOT_SHORTER = "a step is not shorter with it"


class FleetPlanner:
    """What planners of steps and of rounds share: the time that they have, and how a plan is stated and sealed."""

    kind: ClassVar[Kind]
    usual_gap: ClassVar[float] = 1e-3
    accumulate: int
    """micro-batches of an update"""
    micro_batches: int
    """of a step, or a round"""
    aside_bytes: int = 0
    """of each device's budget: for processes beside the run"""

    def __init__(self, described: DescribedFleet, asked: FleetOptions) -> None:
        self.specs = checked_members(described.members)
        self.names = [spec.name for spec in self.specs]
        self.asked, self.gap = asked, self.usual_gap if asked.gap is None else asked.gap
        self.started = time.monotonic()

    def plan(self) -> tuple[FleetPlan, dict[str, Plan]]:
        """The best plan found, with its proof, and the plans of its parts by the names that these have there."""
        raise NotImplementedError

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


class StepPlanner(FleetPlanner):
    """A filling says what is searched, what the replicas of the best are, and what it is compared with."""

    def __init__(self, described: DescribedFleet, asked: FleetOptions) -> None:
        super().__init__(described, asked)
        self.micro_batches = self.accumulate = checked_count(described.count)

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
