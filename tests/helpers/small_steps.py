"""Two small plans whose steps do, between them, everything that a step may do beside updating."""

from __future__ import annotations

from synthetic import decoder_like, small_chain

from tightfit.planner.plan import minimum_budget
from tightfit.planner.plan import plan as solve
from tightfit.planner.schema import Plan

SMALL_STEPS = ("reads and spills", "recomputes")


def small_step(name: str) -> Plan:
    """A small plan in as little memory as it can, or one that recomputes and reads by a fixed rule."""
    if name == "recomputes":
        return solve(decoder_like(2), 1 << 40, policy="mebp")
    chain = small_chain(5, layers=2)
    return solve(chain, int(1.01 * minimum_budget(chain)))
