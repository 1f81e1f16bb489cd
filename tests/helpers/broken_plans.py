"""Plans whose schedules were changed by hand, and the simulator's refusal of them."""

from __future__ import annotations

import pytest

from tightfit.planner.instructions import read_all, write_all
from tightfit.planner.simulation.simulate import InvalidSchedule, simulate


def listed(phase):
    """Its instructions as a plan file has them."""
    return write_all(phase.instructions)


def changed(plan, edit, phase="train", **fields):
    """The plan with `edit` made to a copy of its instructions, as a plan file has them, and other fields replaced."""
    instructions = listed(getattr(plan, phase))
    edit(instructions)
    told = getattr(plan, phase).model_copy(update={"instructions": read_all(instructions)})
    return plan.model_copy(update={phase: told, "peak_bytes": 0, "arena_bytes": plan.arena_bytes, **fields})


def rejected(plan, invariant):
    with pytest.raises(InvalidSchedule) as caught:
        simulate(plan)
    assert caught.value.invariant == invariant, str(caught.value)
    assert f"({invariant})" in str(caught.value)
    return caught.value
