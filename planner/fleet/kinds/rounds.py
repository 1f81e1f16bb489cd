"""Federated rounds: each device's part within its budget, and its local steps.

Each device holds the whole model and waits for nobody. Plans do not depend on how many steps a device takes, so each is
planned once, for the fastest step that its budget holds beside Flower's processes, and of many equal ones as many as
there is time for; `programs.shared_out` then shares the steps out by speed. With the plans' proven bounds in the place
of their seconds, the same sharing-out gives the bound. Ranks may differ between members, where alpha / rank does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.kinds.frame import FleetPlanner, figures_of
from tightfit.planner.fleet.members import (
    check_alike,
    checked_steps,
    rank_of,
    shared,
    trained_tensors,
)
from tightfit.planner.fleet.options import START_SECONDS, FleetOptions
from tightfit.planner.fleet.part_plans import AlonePlans, no_time, while_there_is_time
from tightfit.planner.fleet.programs import (
    Pace,
    Way,
    makespan_of,
    shared_by_weight,
    shared_out,
)
from tightfit.planner.fleet.schema import Baseline, FleetPlan, Link, Member, Replica, Turn
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InfeasibleError
from tightfit.runtime.common.units import format_size


class Rounds(FleetPlanner):
    """What is said of a round, split or not."""

    def __init__(self, described: DescribedFleet, asked: FleetOptions) -> None:
        super().__init__(described, asked)
        self.accumulate = self.specs[0].profile.accumulate
        self.micro_batches = checked_steps(described.count, self.accumulate)
        self.aside_bytes = asked.flower_bytes
        self.start_seconds = START_SECONDS if asked.start is None else asked.start
        self.rooms = [max(1, spec.budget_bytes - asked.flower_bytes) for spec in self.specs]
        """bytes of each device's run"""

    def way(self, link: Link, adapters: tuple[int, int], service: float) -> Way:
        """How a device has its round, with the bytes of the adapters that come and go: one comes and its run gets
        ready, the service takes its seconds, the answer goes.
        """
        down_bytes, up_bytes = adapters
        return Way(
            head=down_bytes / link.down_bytes_per_second + link.latency_seconds + self.start_seconds,
            service=service,
            tail=up_bytes / link.up_bytes_per_second + link.latency_seconds,
        )

    def member(self, at: int, reason: str | None = None) -> Member:
        return super().member(at, reason).model_copy(update={"start_seconds": self.start_seconds})


def turn_of(way: Way, begin: float) -> Turn:
    """When a device does what, whose steps begin so many seconds after the round."""
    return Turn(head_seconds=way.head, begin_seconds=begin, service_seconds=way.service, tail_seconds=way.tail)


def round_seconds(replicas: Sequence[Replica]) -> float:
    """Until the last answer has arrived, added up as the judge does."""
    return max(replica.turn.answered_seconds for replica in replicas if replica.turn is not None)


def in_turn(plans: Sequence[object], budgets: Sequence[Any]) -> list[int]:
    """A member for each budget of each of `plans`, which are those of equal members, in an order in which the first few
    are of use to all: of equal members those with the smallest and the largest budget, then those in the middle between
    two. Budgets may have more with them in which members differ, as tuples.
    """
    first: dict[tuple[int, Any], int] = {}
    for at, (own, budget) in enumerate(zip(plans, budgets)):
        first.setdefault((id(own), budget), at)
    equal: dict[int, list[int]] = {}
    for own, budget in sorted(first):
        equal.setdefault(own, []).append(first[own, budget])
    ranked: list[tuple[int, int]] = []
    for members in equal.values():
        order, gaps = [0, len(members) - 1][: len(members)], [(0, len(members) - 1)]
        for low, high in gaps:
            if high - low > 1:
                order.append((low + high) // 2)
                gaps += [(low, order[-1]), (order[-1], high)]
        ranked += [(rank, members[place]) for rank, place in enumerate(order)]
    return [at for _, at in sorted(ranked)]


class WholePlans:
    """Plans of whole models, of some devices within their rooms."""

    def __init__(self, profiles: Sequence[Profile], rooms: Sequence[int], gap: float) -> None:
        self.plans = shared(profiles, lambda one: AlonePlans(one, 1, gap))
        self.rooms = rooms

    def explore(self, until: float) -> Iterator[tuple[int, int]]:
        """Plan as many as there is time for, in an order in which the first few are of use to all; after each, how many
        of how many have been planned.
        """
        order = in_turn(self.plans, self.rooms)
        for number, (at, share) in enumerate(while_there_is_time(order, until), 1):
            self.plans[at].plan(self.rooms[at], share)
            yield number, len(order)

    def known(self, at: int) -> Plan | None:
        return self.plans[at].known(self.rooms[at])

    def too_small(self, at: int) -> bool:
        """Whether it was found that nothing fits."""
        return self.rooms[at] <= self.plans[at].too_small


# --- without a server -------------------------------------------------------------------------------------------------


class WholeRounds(Rounds):
    kind = "federated"

    def __init__(self, described: DescribedFleet, asked: FleetOptions) -> None:
        super().__init__(described, asked)
        check_alike({spec.name: spec.profile for spec in self.specs})

    def plan(self) -> tuple[FleetPlan, dict[str, Plan]]:
        profiles = [spec.profile for spec in self.specs]
        self.whole = WholePlans(profiles, self.rooms, self.gap)
        self.own_bytes = [sum(tensor.bytes for tensor in trained_tensors(profile)) for profile in profiles]
        for number, many in self.whole.explore(self.until(1.0)):
            self.report(f"planning devices ({number} of {many})")
        plans = [self.whole.known(at) for at in range(len(self.specs))]
        able = [at for at, plan in enumerate(plans) if plan is not None]
        if not able:
            raise self._nothing_fits()
        self.down_bytes = max(self.own_bytes[at] for at in able)  # the fleet's adapter has the largest rank
        self.paces = [self._pace(at, math.inf if plan is None else plan.step_seconds) for at, plan in enumerate(plans)]
        hoped = [self._pace(at, self._bound(at, plan)) for at, plan in enumerate(plans)]
        taken = self._shared_out(self.paces)
        bound = makespan_of(hoped, self._shared_out(hoped))
        replicas = [
            self._replica(at, plan, count) for at, (plan, count) in enumerate(zip(plans, taken)) if plan and count
        ]
        fleet = self.stated(
            replicas,
            lambda at: self._reason(at, plans[at]),
            **figures_of(round_seconds(replicas), bound),
            rank=max(rank_of(profiles[at]) for at in able),
            trained_bytes=self.down_bytes,
            baselines=self._baselines(),
        )
        chosen = {spec.name: plan for spec, plan, count in zip(self.specs, plans, taken) if plan and count}
        return self.judged(fleet, chosen), chosen

    def _pace(self, at: int, step_seconds: float) -> Pace:
        """How fast a device answers by a plan with such steps."""
        way = self._way(at, 0.0)
        return Pace(fixed_seconds=way.head + way.tail, step_seconds=step_seconds)

    def _way(self, at: int, service: float) -> Way:
        return self.way(self.specs[at].link, (self.down_bytes, self.own_bytes[at]), service)

    def _shared_out(self, paces: Sequence[Pace]) -> list[int]:
        return shared_out(paces, self.micro_batches, self.accumulate)

    def _bound(self, at: int, plan: Plan | None) -> float:
        """Seconds of a step that no plan of the device undercuts."""
        bound = self.whole.plans[at].bound(self.rooms[at])
        return bound if plan is None else min(bound, plan.step_seconds)

    def _replica(self, at: int, plan: Plan, count: int) -> Replica:
        bound, way = self._bound(at, plan), self._way(at, count * plan.step_seconds)
        return Replica(
            parts=[self.part(at, plan, bound_seconds=bound)],
            micro_batches=count,
            rank=rank_of(self.specs[at].profile),
            adapter_bytes=self.own_bytes[at],
            step_seconds=plan.step_seconds,
            bound_seconds=bound,
            turn=turn_of(way, way.head),
        )

    def _reason(self, at: int, plan: Plan | None) -> str:
        if plan is not None:
            return "a round would only wait for it"
        return f"it cannot hold a step: it {self._lacking(at)}" if self.whole.too_small(at) else no_time()

    def _needed(self, at: int) -> int:
        return self.whole.plans[at].least_room(self.until(1.0) - time.monotonic()) + self.aside_bytes

    def _lacking(self, at: int) -> str:
        return (
            f"needs {format_size(self._needed(at))}, of which {format_size(self.aside_bytes)} for Flower, and may take"
            f" {format_size(self.specs[at].budget_bytes)}"
        )

    def _nothing_fits(self) -> InfeasibleError:
        planned = [at for at in range(len(self.specs)) if self.whole.too_small(at)]
        told = "; ".join(f"{self.names[at]} {self._lacking(at)}" for at in planned)
        if others := len(self.specs) - len(planned):
            told += f"; of {others} others none was planned: {no_time()}"
        return InfeasibleError(
            f"no device can hold a step: {told}; give one of them more memory, or profile with a smaller batch or a"
            " shorter sequence",
            min(self._needed(at) for at in planned),
        )

    # --- what it is compared with -----------------------------------------------------------------------------------

    def _baselines(self) -> list[Baseline]:
        names, paces = self.names, self.paces
        units, count = self.micro_batches // self.accumulate, len(names)
        shares = [self.accumulate * share for share in shared_by_weight([1.0] * count, units)]
        unfit = [name for name, share, pace in zip(names, shares, paces) if share and pace.step_seconds == math.inf]
        equal = Baseline(
            name="equal steps",
            makespan_seconds=None if unfit else makespan_of(paces, shares),
            shares=dict(zip(names, shares)),
            reason=f"{', '.join(unfit)} cannot hold a step" if unfit else None,
        )
        fastest = min(range(count), key=lambda at: paces[at].answered(self.micro_batches))
        steps = {name: self.micro_batches * (at == fastest) for at, name in enumerate(names)}
        alone = paces[fastest].answered(self.micro_batches)
        return [equal, Baseline(name="fastest alone", makespan_seconds=alone, shares=steps)]
