"""Plans of tiny models that spill, although their start needs more memory than any of their steps does."""

from __future__ import annotations

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan_result import sealed
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Profile


def with_small_start(profile: Profile) -> Profile:
    """The profile of a machine on which the start needs no more than what stays resident."""
    floor = profile.device.floor
    floor = floor.model_copy(update={"import_peak_bytes": floor.resident_bytes})
    return profile.model_copy(update={"device": profile.device.model_copy(update={"floor": floor})})


def spilling_plan(profile: Profile) -> Plan:
    """The schedule of the smallest budget that the step alone needs, as a plan in the budget that the start needs
    too.
    """
    planner = ModelPlanner(with_small_start(profile))
    schedule = planner.plan(planner.minimum(time_limit=600).peak_bytes, time_limit=600)
    budget = ModelPlanner(profile).minimum(time_limit=600).peak_bytes
    assert schedule.peak_bytes <= budget
    assert schedule.train is not None
    assert schedule.train.write_bytes > 0
    return sealed(schedule.model_copy(update={"device": profile.device, "budget_bytes": budget, "peak_bytes": budget}))
