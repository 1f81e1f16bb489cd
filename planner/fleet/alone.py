"""Members that hold the whole model, each with an ordinary plan: those that take part in a step alone, which accumulate all of
it and make the update themselves, and the devices of federated rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tightfit.planner.fleet.member_plans import LEAST_SECONDS
from tightfit.planner.fleet.pieces import trained_tensors
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import rebudgeted
from tightfit.planner.protocol import Planner
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Profile

SHARE = 0.5
"""of the time that is left: for the plan of one member of several"""


class AlonePlans:
    """The plans of a device's profile, by budgets; seconds are those of all `micro_batches` of a step."""

    def __init__(self, profile: Profile, micro_batches: int, gap: float) -> None:
        self.micro_batches = micro_batches
        self.gap = gap
        self.planner: Planner = planner_of(profile)
        self._made: dict[int, Plan] = {}
        self._least: dict[int, Plan] = {}
        """plans that were made for a larger budget, at the budget of their peak"""

    def plan(self, budget_bytes: int, time_limit: float) -> Plan:
        """The plan at a budget; its status is infeasible where nothing fits. Raises KeyboardInterrupt on Ctrl-C."""
        if budget_bytes not in self._made:
            limit = max(LEAST_SECONDS, time_limit)
            self._made[budget_bytes] = self.planner.plan(budget_bytes, time_limit=limit, gap=self.gap)
            if self.planner.interrupted:
                raise KeyboardInterrupt
        return self._made[budget_bytes]

    def known(self, budget_bytes: int) -> Plan | None:
        """The plan at a budget; where there was no time for one the fastest other one that fits, or one that says that nothing
        does. None: nothing is known.
        """
        if budget_bytes in self._made:
            return self._made[budget_bytes]
        fitting = [plan for plan in self._made.values() if plan.train is not None and plan.peak_bytes <= budget_bytes]
        if not fitting:
            return next(
                (plan for asked, plan in self._made.items() if plan.train is None and asked >= budget_bytes), None
            )
        fastest = min(fitting, key=lambda plan: plan.step_seconds)
        if fastest.budget_bytes <= budget_bytes:
            return fastest
        # At the budget that it takes, so that all who have room for it can have the same.
        peak = fastest.peak_bytes
        if peak not in self._least:
            self._least[peak] = rebudgeted(fastest, budget_bytes=peak)
        return self._least[peak]

    def makespan(self, budget_bytes: int) -> float:
        """Seconds of a step, as planned so far; infinite where nothing fits, or nothing was planned."""
        plan = self._made.get(budget_bytes)
        return math.inf if plan is None or plan.train is None else self.micro_batches * plan.step_seconds

    def bound(self, budget_bytes: int) -> float:
        """Seconds that no step undercuts: those of a plan's bound at this budget or a larger one, or of one run of every
        operator.
        """
        plans = [plan for asked, plan in self._made.items() if asked >= budget_bytes]
        if any(plan.train is None for plan in plans):
            return math.inf
        return self.micro_batches * max([plan.bound_seconds for plan in plans], default=self._least_seconds())

    def _least_seconds(self) -> float:
        profile = self.planner.profile
        programs = {program.name: program for program in profile.programs}
        operators = [one for layer in profile.layers for one in programs[layer.program].operators]
        return sum(one.seconds for one in operators if one.phase != "inference") + sum(
            tensor.update_seconds for tensor in trained_tensors(profile)
        )


def in_turn(plans: Sequence[object], budgets: Sequence[Any]) -> list[int]:
    """A member for each budget of each of `plans`, which are those of equal members, in an order in which the first few are of use
    to all: of equal members those with the smallest and the largest budget, then those in the middle between two. Budgets may have
    more with them in which members differ, as tuples.
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


@dataclass(kw_only=True)
class AloneSearch:
    """The search for the member whose step is the shortest if it takes part alone."""

    plans: Sequence[AlonePlans]
    """by member; those with equal profiles share theirs"""
    budgets: Sequence[int]
    best: int | None = None
    _tried: set[int] = field(default_factory=set)

    @property
    def makespan(self) -> float:
        """Seconds of the best member's step."""
        return math.inf if self.best is None else self.plans[self.best].makespan(self.budgets[self.best])

    @property
    def bound(self) -> float:
        """No member alone takes less."""
        return min(plans.bound(budget) for plans, budget in zip(self.plans, self.budgets))

    def run(self, deadline: float) -> None:
        """Plan members, until none that is left can be faster than those that have been planned."""
        order = sorted(
            range(len(self.plans)), key=lambda at: (self.plans[at].bound(self.budgets[at]), -self.budgets[at])
        )
        for at in order:
            plans, budget = self.plans[at], self.budgets[at]
            larger = any(self.plans[other] is plans and self.budgets[other] >= budget for other in self._tried)
            if plans.bound(budget) < self.makespan and not larger:
                left = deadline - time.monotonic()
                if left <= 0 and self.best is not None:
                    break
                plans.plan(budget, left if len(order) == 1 else SHARE * left)
                self._tried.add(at)
                if plans.makespan(budget) < self.makespan:
                    self.best = at
