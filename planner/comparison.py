"""Defines `Comparison`: what `tightfit.planner.compare.compare` returns, and a service sends."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from tightfit.planner.schema import Plan


class Comparison(BaseModel):
    """Plans of one profile, by device, then by budget (smallest first), then in the order of the policies asked for.

    A comparison that was interrupted lacks the plans that were not made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    devices: list[str]
    budgets: list[int]
    policies: list[str]
    plans: list[Plan]

    def plan(self, budget_bytes: int, policy: str, device: str | None = None) -> Plan:
        """The plan of one cell, on the first device unless one is named; raises KeyError where there is none."""
        where = device or self.devices[0]
        for plan in self.plans:
            if (plan.budget_bytes, plan.policy, plan.device.name) == (budget_bytes, policy, where):
                return plan
        raise KeyError((budget_bytes, policy, where))
