"""What every planner can be asked, whatever it plans: `tightfit.planner.plan.planner_of` makes the one for a profile."""

from __future__ import annotations

from typing import Protocol

from tightfit.planner.schema import Plan
from tightfit.planner.search_options import Progress
from tightfit.profiles.schema import Profile


class Planner(Protocol):
    """One profile, any number of budgets: what is found and proven at one budget helps at the next."""

    profile: Profile
    interrupted: bool
    """whether Ctrl-C ended the search of the latest `plan`, which was made of what had been found"""

    def plan(
        self,
        budget_bytes: int,
        *,
        policy: str | None = None,
        time_limit: float = 30.0,
        gap: float = 0.0,
        progress: Progress | None = None,
    ) -> Plan:
        """As `tightfit.planner.plan.plan`."""
        ...

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = 30.0) -> Plan:
        """The plan of the smallest budget, in full."""
        ...

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = 30.0) -> int:
        """The smallest budget in bytes for which `plan` has a plan."""
        ...

    def bound(self, budget_bytes: int, *, time_limit: float = 30.0) -> float | None:
        """Seconds per step that no plan of the class undercuts at a budget; None: none fits there.

        Raises TimeoutError where the time limit strikes first.
        """
        ...

    def class_bound(self, solved: Plan) -> float:
        """Seconds that no plan of the class undercuts, as far as was proven when the solver planned at the budget of `solved`."""
        ...

    def policies(self) -> tuple[str, ...]:
        """The fixed rules that mean something for the profile and follow the exact gradient."""
        ...

    def neighbour_bytes(self, budget_bytes: int) -> int:
        """By how many bytes budgets differ from this one that show what memory is worth there."""
        ...
