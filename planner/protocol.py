"""The interface that planners of models and of bare graphs share; `tightfit.planner.plan.planner_of` makes the one for
a profile.
"""

from __future__ import annotations

from typing import Protocol

from tightfit.planner.schema import Plan
from tightfit.planner.search_options import TIME_LIMIT, SearchProgress
from tightfit.profiles.schema import Profile


class Planner(Protocol):
    """Plans one profile at any number of budgets; what is found and proven at one budget is reused at the next."""

    profile: Profile
    interrupted: bool
    """whether Ctrl-C ended the search of the latest `plan`, which was made of what had been found"""

    def plan(
        self,
        budget_bytes: int,
        *,
        policy: str | None = None,
        time_limit: float | None = TIME_LIMIT,
        gap: float = 0.0,
        progress: SearchProgress | None = None,
    ) -> Plan:
        """As `tightfit.planner.plan.plan`."""
        ...

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> Plan:
        """The plan at the smallest budget found, with its bounds."""
        ...

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> int:
        """The smallest budget, in bytes, for which `plan` finds a plan."""
        ...

    def bound(self, budget_bytes: int, *, time_limit: float = TIME_LIMIT) -> float | None:
        """A lower bound on the seconds per step of every plan of the class within `budget_bytes`; None: none fits.

        `time_limit` is in seconds; a planner may raise TimeoutError where it is over before there is a bound.
        """
        ...

    def class_bound(self, solved: Plan) -> float:
        """The best lower bound, in seconds, on every plan of the class that was proven when the solver planned at the
        budget of `solved`.
        """
        ...

    def policies(self) -> tuple[str, ...]:
        """The fixed rules that mean something for the profile and follow the exact gradient."""
        ...

    def neighbour_bytes(self, budget_bytes: int) -> int:
        """Distance in bytes from this budget to the neighbouring ones that are used to value memory."""
        ...
