"""Helpers that break a plan's schedule by an edit and assert which invariant the simulator finds violated; changes of
fleets.
"""

from __future__ import annotations

import pytest

from tightfit.planner.instructions import read_all, write_all
from tightfit.planner.simulation.simulate import InvalidSchedule, simulate


def listed(phase):
    """The instructions of a phase as JSON arrays, as in a plan file."""
    return write_all(phase.instructions)


def changed(plan, edit, phase="train", **fields):
    """A copy of the plan with `edit` applied to the instructions of a phase (JSON arrays as in a plan file) and
    `fields` replaced.
    """
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
