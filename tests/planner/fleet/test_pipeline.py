"""Whole pipelines: two devices train what neither could hold, members that take no part, files, reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fleet_kinds import plan_pipeline
from fleet_views import computing
from synthetic import MIB, small_chain

from tightfit.planner.fleet.fleet_search import DivisionSearch
from tightfit.planner.fleet.io import load_fleet, load_member_plan, save_fleet
from tightfit.planner.fleet.kinds.pipeline import least_seconds
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.parts import link_bytes
from tightfit.planner.fleet.simulate import simulate_fleet
from tightfit.planner.report.fleet_text import fleet_sentences, fleet_sheet
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.engine.training.job import passes_messages


def baseline(fleet, name):
    return next(one for one in fleet.baselines if one.name == name)


def test_two_devices_train_what_neither_could_hold(pipelined):
    fleet, plans = pipelined
    assert [(one.member, one.layers) for one in fleet.parts] == [("a", [0, 2]), ("b", [2, 4])]
    assert [one.layer_names for one in fleet.parts] == [["l0", "l1"], ["l2", "l3"]]
    assert all(plans[one.name].peak_bytes == one.peak_bytes <= one.budget_bytes for one in computing(fleet))
    assert all(passes_messages(plan.programs) for plan in plans.values())
    alone = baseline(fleet, "fastest alone")
    assert (alone.makespan_seconds, alone.reason) == (None, "no device can hold a micro-batch alone")
    assert baseline(fleet, "equal layers").shares == {"a": 2, "b": 2}
    assert 0 < fleet.bound_seconds <= fleet.makespan_seconds <= baseline(fleet, "equal layers").makespan_seconds
    assert fleet.bit_identical
    assert fleet.parts[0].ahead > 0
    first = fleet.parts[0]
    assert fleet.makespan_seconds >= fleet.micro_batches * (first.micro_batch_seconds + first.forward_seconds) - 1e-9


def test_the_same_pipeline_again_is_the_same(pipelined, stages):
    fleet, plans = pipelined
    again, others = plan_pipeline(stages((1.0, 1.0), budget=20 * MIB), 4)
    assert {name: one.fingerprint for name, one in others.items()} == {n: one.fingerprint for n, one in plans.items()}
    timeless = {"fingerprint": "", "solve_seconds": 0.0}
    assert again.model_copy(update=timeless) == fleet.model_copy(update=timeless)


def test_files(pipelined, tmp_path):
    fleet, plans = pipelined
    save_fleet(fleet, plans, tmp_path)
    found = load_fleet(tmp_path)
    assert found == fleet
    assert {name: load_member_plan(tmp_path, found, name) for name in "ab"} == plans
    simulate_fleet(found, plans)
    with pytest.raises(InputError, match=r"of another kind \(pipeline\)"):
        load_fleet(tmp_path, in_rounds=True)
    (tmp_path / "fleet.json").write_text(fleet.model_dump_json().replace('"ahead":', '"ahead":1'))
    with pytest.raises(InputError, match="changed or damaged"):
        load_fleet(tmp_path)


def test_rounded_messages_take_less(pipelined, stages):
    fleet, _ = pipelined
    rounded, plans = plan_pipeline(stages((1.0, 1.0), budget=20 * MIB), 4, bits=8)
    assert (rounded.bits, rounded.bit_identical) == (8, False)
    assert rounded.differences == ["messages are rounded to 8 bits"]
    # Four numbers to a row: a byte each and a scale, for 16 bytes.
    assert link_bytes(rounded)[0] < 0.51 * link_bytes(fleet)[0]
    assert rounded.parts[0].exchange_bytes < fleet.parts[0].exchange_bytes
    simulate_fleet(rounded, plans)
    with pytest.raises(InputError, match="messages of 4 bits: give 8, or 0"):
        plan_pipeline(stages((1.0, 1.0)), 4, bits=4)


def test_members_that_take_no_part(stages, link):
    a, b, c = stages((1.0, 1.0, 1.0), budget=20 * MIB)
    fleet, plans = plan_pipeline([replace(a, budget_bytes=5 * MIB), b, c], 2)
    assert fleet.names == ["b", "c"]
    assert fleet.members[-1].reason == "it cannot hold a stage: it needs 6.0 MiB and may take 5.0 MiB"
    simulate_fleet(fleet, plans)
    far = replace(a, link=link(1e4))
    fleet, _ = plan_pipeline([far, b, c], 2)
    assert fleet.names == ["b", "c"]
    assert fleet.members[-1].reason == "a step is not shorter with it"


def test_one_device_that_is_faster_alone(stages):
    a, b = stages((1.0, 1.0), budget=40 * MIB, rate=1e5)
    fleet, plans = plan_pipeline([a, replace(b, budget_bytes=20 * MIB)], 2)
    (only,) = fleet.parts
    assert (only.member, only.layers, only.exchange_bytes) == ("a", [0, 4], 0)
    assert fleet.makespan_seconds == pytest.approx(2 * plans["a"].step_seconds)
    assert (link_bytes(fleet), only.up, only.down) == ([], [], [])
    simulate_fleet(fleet, plans)
    assert "a does all of it alone: nothing is exchanged" in fleet_sentences(fleet)


def test_nothing_fits(stages):
    specs = stages((1.0, 1.0), budget=12 * MIB)
    with pytest.raises(InfeasibleError) as caught:
        plan_pipeline(specs, 2)
    message = str(caught.value)
    assert "of equal parts a needs " in message
    assert "and may take 12.0 MiB for 2 layers; b needs " in message
    least = caught.value.minimum_budget_bytes
    fleet, _ = plan_pipeline([replace(one, budget_bytes=least + MIB // 4) for one in specs], 2)
    assert len(fleet.names) == 2


def test_progress_ends_with_the_answer(stages):
    told = []
    fleet, _ = plan_pipeline(stages((1.0, 1.0), budget=20 * MIB), 3, progress=told.append)
    assert all({"stage", "incumbent", "bound", "gap", "seconds"} <= set(one) for one in told)
    assert told[-1]["incumbent"] == pytest.approx(fleet.makespan_seconds)
    bounds = [one["bound"] for one in told]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_keeps_the_best_so_far(stages, monkeypatch, after):
    once, asked = DivisionSearch.attempt, []

    def attempt(self, division):
        asked.append(division)
        if len(asked) > after:
            raise KeyboardInterrupt
        return once(self, division)

    monkeypatch.setattr(DivisionSearch, "attempt", attempt)
    specs = stages((1.0, 0.5), budget=24 * MIB)
    if not after:
        with pytest.raises(KeyboardInterrupt):
            plan_pipeline(specs, 4)
        return
    fleet, plans = plan_pipeline(specs, 4)
    assert fleet.baselines == []
    simulate_fleet(fleet, plans)


def test_models_without_a_cut(link):
    specs = [MemberSpec(name=name, profile=small_chain(3, layers=3), budget_bytes=MIB, link=link()) for name in "ab"]
    assert least_seconds(specs, 2) is None
    with pytest.raises(InputError, match="synthetic cannot be cut"):
        plan_pipeline(specs, 2)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_it_is_told_in_sentences(pipelined):
    fleet, _ = pipelined
    said = fleet_sentences(fleet)
    assert said[1].startswith("one step of 4 micro-batches takes ")
    assert "of the best cuts and plans of this kind" in said[1]
    assert any("pass over the cut in a step, as they are; a goes forward ahead" in one for one in said)
    assert "the fastest alone: not possible, no device can hold a micro-batch alone" in said
    assert said[-1] == "results equal those of one process to the bit, whatever the cuts"
    rows = fleet_sheet(fleet).rows
    assert [row[:4] for row in rows] == [["a", "2", "l0 … l1", str(fleet.parts[0].ahead)], ["b", "2", "l2 … l3", "0"]]
