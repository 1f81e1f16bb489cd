"""The smallest plans that calls have found: later calls know them."""

import pytest
from synthetic import small_chain

from tightfit.planner.io import load_plan, save_plan
from tightfit.planner.known_plans import remember_smallest, smallest_known
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.simulation.simulate import simulate
from tightfit.planner.solve.model_search import SearchResult


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    return tmp_path


def hurried(profile):
    """A planner whose own search for the smallest budget finds nothing below the fixed rule."""
    planner = ModelPlanner(profile)
    planner.solver.lowest_schedule = lambda cutoff: (planner.solver.smallest, False)
    planner.solver.solve = lambda *given, bound, **options: SearchResult(schedule=None, bound_seconds=bound)
    return planner


def test_what_one_call_has_found_the_next_one_plans_with(tmp_path):
    profile = small_chain(4)
    least = ModelPlanner(profile).minimum_bytes(time_limit=10)
    assert hurried(profile).solver.smallest.peak_bytes > least
    found = hurried(profile).plan(least, time_limit=10)
    assert (found.status, found.budget_bytes, found.peak_bytes) == ("feasible", least, least)
    assert simulate(found).step_seconds == found.step_seconds >= found.bound_seconds
    assert load_plan(save_plan(found, tmp_path / "plan.json")) == found
    below = hurried(profile).plan(least - 1, time_limit=10)
    assert (below.fits, below.minimum_budget_bytes) == (False, least)
    assert hurried(profile).minimum_bytes(time_limit=10) == least
    smallest = hurried(profile).smallest_plan(time_limit=10)
    assert (smallest.peak_bytes, smallest.deterministic) == (least, False)
    assert load_plan(save_plan(smallest, tmp_path / "plan.json")) == smallest


def test_a_plan_of_another_profile_or_rule_is_not_taken():
    profile = small_chain(4)
    ModelPlanner(profile).minimum_bytes(time_limit=10)
    assert smallest_known(profile, "solver") is not None
    assert smallest_known(profile, "mebp") is None
    assert smallest_known(small_chain(3), "solver") is None
    slower = profile.model_copy(
        update={"device": profile.device.model_copy(update={"threads": profile.device.threads + 1})}
    )
    assert smallest_known(slower, "solver") is None


def test_only_a_lower_peak_replaces_what_is_known_and_damage_is_as_nothing(cache):
    profile = small_chain(4)
    planner = ModelPlanner(profile)
    larger, least = planner.plan(1 << 40, time_limit=10), planner.smallest_plan(time_limit=10)
    remember_smallest(profile, larger)
    assert smallest_known(profile, "solver").peak_bytes == least.peak_bytes < larger.peak_bytes
    (file,) = (cache / "smallest").glob("*.json")
    file.write_text("{")
    assert smallest_known(profile, "solver") is None
    remember_smallest(profile, larger)
    assert smallest_known(profile, "solver").peak_bytes == larger.peak_bytes
