"""Plan files, comparisons and plans in words."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from changed_operators import with_operators
from sample_plans import infeasible_plan, sample_plan
from synthetic import MIB, device, small_chain

from tightfit.planner.compare import _ComparedPlan, _ComparisonTable, compare
from tightfit.planner.io import load_plan, save_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan_result import ROUNDING, fingerprint, rebudgeted
from tightfit.planner.report.explain import explain, percent_within
from tightfit.planner.schema import PLAN_VERSION
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.errors import InputError


@pytest.fixture(scope="module")
def planner():
    return ModelPlanner(small_chain(12, layers=3))


@pytest.fixture(scope="module")
def made(planner):
    return planner.plan(int(planner.minimum().peak_bytes * 1.2))


def test_there_and_back(made, tmp_path):
    path = save_plan(made, tmp_path / "plan.json")
    assert load_plan(path) == made
    assert fingerprint(made) == made.fingerprint


def test_plans_are_read_without_the_solver():
    code = "import sys, tightfit.planner.io; print([m for m in ('ortools', 'torch', 'numpy') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def damaged(made, tmp_path, edit):
    path = tmp_path / "plan.json"
    save_plan(made, path)
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        load_plan(path)
    assert str(path) in str(caught.value)
    assert "tightfit plan" in str(caught.value)
    return str(caught.value)


def test_a_missing_plan(tmp_path):
    with pytest.raises(InputError, match="no such plan; make one with `tightfit plan"):
        load_plan(tmp_path / "none.json")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_plan(made, tmp_path, share):
    assert "not whole JSON" in damaged(made, tmp_path, lambda data: data[: int(share * len(data))])


def test_flipped_bits(made, tmp_path):
    """Any changed figure is noticed."""

    def edit(data):
        at = data.index(b'"budget_bytes":') + len(b'"budget_bytes":')
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    assert "does not match its fingerprint" in damaged(made, tmp_path, edit)
    assert "not whole JSON" in damaged(made, tmp_path, lambda data: b"\xff" + data[1:])


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5_000])
def test_json_that_no_parser_takes_is_no_plan(made, tmp_path, content):
    assert "not whole JSON" in damaged(made, tmp_path, lambda data: content)


def test_another_version(made, tmp_path):
    now = f'"version":{PLAN_VERSION}'.encode()
    for version, age in ((1, "an older"), (PLAN_VERSION + 1, "a newer")):
        edited = f'"version":{version}'.encode()
        text = damaged(made, tmp_path, lambda data, edited=edited: data.replace(now, edited, 1))
        assert (
            f"written by {age} version of tightfit (plan version {version}, this one reads version {PLAN_VERSION})"
            in text
        )


def test_no_plan_at_all(made, tmp_path):
    assert "not a plan" in damaged(made, tmp_path, lambda data: b"[1, 2]")
    profile = json.dumps({"version": PROFILE_VERSION, "programs": [], "layers": []}).encode()
    assert "a profile, not a plan" in damaged(made, tmp_path, lambda data: profile)


def test_a_field_that_is_wrong(made, tmp_path):
    text = damaged(made, tmp_path, lambda data: data.replace(b'"status":"', b'"status":"very ', 1))
    assert "field status" in text


def test_compare_is_a_table_of_plans(planner):
    profile = planner.profile
    smallest = planner.minimum().peak_bytes
    told = []
    result = compare(profile, [smallest * 2, smallest], progress=lambda *state: told.append(state))
    assert result.budgets == [smallest, smallest * 2]
    assert [(p.budget_bytes, p.policy) for p in result.plans] == [
        (budget, policy)
        for budget in result.budgets
        for policy in ("solver", "keep-all", "checkpoint-layers", "checkpoint-sqrt", "mebp", "mesp")
    ]
    roomy = result.plan(smallest * 2, "solver")
    for plan in result.plans:
        assert plan.fingerprint == fingerprint(plan)
        if plan.budget_bytes == smallest * 2 and plan.fits:
            assert plan.step_seconds >= roomy.step_seconds * (1 - 1e-9)
            assert plan.gap >= roomy.gap - 1e-9
    assert told[-1] == ("planning", 12, 12)
    with pytest.raises(KeyError):
        result.plan(1, "solver")


def test_compare_over_devices(planner):
    from tightfit.profiles.devices.data_sheets import find_device
    from tightfit.profiles.devices.estimate import retarget

    profile = with_operators(planner.profile, lambda _: {"flops": 1e6})
    card = find_device("rtx-4060")
    told = []
    result = compare(profile, [1 << 30], ["keep-all"], devices=[None, card], progress=lambda *state: told.append(state))
    assert result.devices == [profile.device.name, "rtx-4060"]
    here, there = result.plans
    assert result.plan(1 << 30, "keep-all", "rtx-4060") == there
    assert result.plan(1 << 30, "keep-all") == here
    assert (there.device.kind, there.device.measured) == ("cuda", False)
    (named,) = compare(profile, [1 << 30], ["keep-all"], devices=["rtx-4060"]).plans
    assert named.fingerprint == there.fingerprint
    with pytest.raises(InputError, match="no device is called 'tpu9'; choose"):
        compare(profile, [1 << 30], ["keep-all"], devices=["tpu9"])
    alone = ModelPlanner(retarget(profile, card)).plan(1 << 30, policy="keep-all")
    assert (there.step_seconds, there.peak_bytes) == (alone.step_seconds, alone.peak_bytes)
    assert told == [
        (f"planning for {profile.device.name}", 0, 2),
        ("planning for rtx-4060", 1, 2),
        ("planning for rtx-4060", 2, 2),
    ]
    with pytest.raises(InputError, match="rtx-4060 is compared with itself; name each device once"):
        compare(profile, [1 << 30], ["keep-all"], devices=[card, card])
    with pytest.raises(InputError, match="states no FLOPs"):
        compare(planner.profile, [1 << 30], ["keep-all"], devices=[card])
    with pytest.raises(InputError, match="no devices to compare; name at least one, or leave them out"):
        compare(profile, [1 << 30], ["keep-all"], devices=[])
    with pytest.raises(InputError, match="no policies to compare; name at least one, or leave them out"):
        compare(profile, [1 << 30], [])


def test_an_interrupted_comparison_keeps_what_it_has(planner):
    def interrupt(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    result = compare(planner.profile, [1 << 29, 1 << 30], ["keep-all", "mebp"], progress=interrupt)
    assert [(plan.budget_bytes, plan.policy) for plan in result.plans] == [(1 << 30, "keep-all"), (1 << 30, "mebp")]

    def at_once(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(planner.profile, [1 << 30], ["keep-all"], progress=at_once)


@pytest.mark.parametrize(("peak", "least"), [(440, 431), (425, 425)])
def test_one_policy_needs_one_smallest_budget(planner, peak, least):
    """Each search for it may be cut elsewhere by the clock; the table says what the best of them found."""
    made = [
        infeasible_plan("solver", budget=200 * MIB, minimum=431 * MIB),
        infeasible_plan("solver", budget=400 * MIB, minimum=452 * MIB),
        infeasible_plan("keep-all", budget=400 * MIB, minimum=900 * MIB),
        sample_plan(budget=500 * MIB, peak=peak * MIB),
    ]
    table = _ComparisonTable(
        planner=planner,
        budgets=[200 * MIB, 400 * MIB, 500 * MIB],
        policies=["solver", "keep-all"],
        time_limit=1,
        gap=0.0,
        tell=print,
        solving=None,
        planned=None,
        compared={(plan.budget_bytes, plan.policy): _ComparedPlan(plan=plan, bound_seconds=0.0) for plan in made},
    )
    told = {(plan.budget_bytes // MIB, plan.policy): plan for plan in table.monotone()}
    assert told[200, "solver"].minimum_budget_bytes == told[400, "solver"].minimum_budget_bytes == least * MIB
    assert told[400, "solver"].minimum_budget_reason is None
    assert told[400, "keep-all"].minimum_budget_bytes == 900 * MIB
    assert told[500, "solver"].minimum_budget_bytes is None


def table_of(planner, made):
    return _ComparisonTable(
        planner=planner,
        budgets=sorted({plan.budget_bytes for plan in made}),
        policies=["solver"],
        time_limit=1,
        gap=0.0,
        tell=print,
        solving=None,
        planned=None,
        compared={(plan.budget_bytes, plan.policy): _ComparedPlan(plan=plan, bound_seconds=0.0) for plan in made},
    )


def test_a_larger_budget_s_plan_stands_where_it_fits_and_none_was_found(planner):
    made = [
        infeasible_plan("solver", budget=400 * MIB, minimum=452 * MIB),
        infeasible_plan("solver", budget=440 * MIB, minimum=452 * MIB),
        sample_plan(budget=500 * MIB, peak=425 * MIB),
    ]
    short, fits, roomy = table_of(planner, made).monotone()
    assert (short.status, short.minimum_budget_bytes) == ("infeasible", 425 * MIB)
    assert (fits.budget_bytes, fits.peak_bytes, fits.step_seconds) == (440 * MIB, 425 * MIB, roomy.step_seconds)
    assert fits.minimum_budget_bytes is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_smallest_budget_is_as_sure_as_the_plan_it_is_of(planner, deterministic):
    made = [
        infeasible_plan("solver", budget=400 * MIB, minimum=452 * MIB).model_copy(update={"deterministic": True}),
        sample_plan(budget=500 * MIB, peak=425 * MIB, deterministic=deterministic),
    ]
    short = table_of(planner, made).monotone()[0]
    assert (short.minimum_budget_bytes, short.deterministic) == (425 * MIB, deterministic)


def test_compare_refuses(planner):
    with pytest.raises(InputError, match="no budgets"):
        compare(planner.profile, [])
    with pytest.raises(InputError, match="no policy is called 'best'"):
        compare(planner.profile, [1 << 30], ["best"])


def test_a_plan_told_at_a_larger_budget(made):
    wider = rebudgeted(made, budget_bytes=made.budget_bytes * 2)
    assert (wider.budget_bytes, wider.train) == (made.budget_bytes * 2, made.train)
    assert wider.fingerprint == fingerprint(wider) != made.fingerprint


def test_in_words(made):
    text = "\n".join(explain(made))
    assert f"one step takes {made.step_seconds:.3f} s by the model" in text
    assert ("proven optimal" in text) == (made.status == "optimal") == (made.gap <= ROUNDING)
    assert ("of the best plan of its kind, where" in text) == (made.status == "feasible")
    assert f"could save more than {percent_within(made.any_schedule_gap)} of its time" in text
    assert "times are estimated" in text
    assert made.train.peak.text in text


def test_infeasible_in_words():
    floor = device(import_peak=122 * MIB, resident=106 * MIB)
    planner = ModelPlanner(small_chain(12, on=floor))
    lines = explain(planner.plan(100 * MIB))
    assert lines[0] == "no plan fits 100.0 MiB for the whole process, Python and PyTorch included"
    assert lines[1].startswith("the smallest feasible budget ")
    assert "importing Python and PyTorch" in lines[2]


def test_a_rule_that_does_not_fit_speaks_for_itself_alone():
    """Plans of the solver do fit there."""
    planner = ModelPlanner(small_chain(12))
    least = planner.plan(1).minimum_budget_bytes
    assert planner.plan(least + MIB).fits
    lines = explain(planner.plan(least, policy="keep-all"))
    assert lines[0].startswith("the rule keep-all does not fit ")
    assert lines[1].startswith("its smallest feasible budget ")
    assert not any("no plan fits" in line for line in lines)
