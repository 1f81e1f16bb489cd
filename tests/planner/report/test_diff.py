"""Two plans tensor by tensor: differences of the plans themselves, in every form they are told."""

from __future__ import annotations

import base64
import gzip
import json

import pytest
from broken_plans import listed
from hand_costs import by_hand
from html_page import Page
from synthetic import PAGE, decoder_like, device

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.report.costs import CostLedger
from tightfit.planner.report.diff import PlanChange, diff, grouped
from tightfit.planner.report.html import comparison_page
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import MIB


@pytest.fixture(scope="module")
def plans():
    """One model by three rules: all kept, recomputed, and streamed as well."""
    on = device(resident=50 * MIB, import_peak=50 * MIB, per_instruction=100)
    planner = ModelPlanner(decoder_like(3, tokens=128, slices=2, slice_rows=512, on=on))
    return [planner.plan(1 << 30, policy=policy) for policy in ("keep-all", "checkpoint-layers", "mebp")]


def test_a_plan_does_not_differ_from_itself(plans):
    for plan in plans:
        assert diff(plan, plan) == []


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (2, 0)])
def test_changes_are_the_decisions_and_their_sums_the_plans_differences(plans, first, second):
    before, after = plans[first], plans[second]
    changes = diff(before, after)
    changed = {name for name, decision in before.decisions.items() if after.decisions.get(name) != decision}
    changed |= set(after.decisions) - set(before.decisions)
    assert changed <= {change.name for change in changes}
    for change in changes:
        assert (change.before, change.after) == (before.decisions.get(change.name), after.decisions.get(change.name))
        assert change.bytes == CostLedger(before).index.tensors[change.name].bytes

    def compute(plan):
        return plan.train.recompute_seconds + plan.train.unpack_seconds

    def moved(plan):
        return plan.train.read_bytes + plan.train.write_bytes

    def transfers(plan):
        verbs = [instruction[0] for instruction in listed(plan.train)]
        count = sum(verb in ("read", "fetch", "spill") for verb in verbs)
        return count * plan.device.read.latency_seconds + moved(plan) / plan.device.read.bytes_per_second

    assert sum(c.compute_seconds for c in changes) == pytest.approx(compute(after) - compute(before))
    assert sum(c.moved_bytes for c in changes) == moved(after) - moved(before)
    assert sum(c.transfer_seconds for c in changes) == pytest.approx(transfers(after) - transfers(before))
    assert [c.bytes for c in changes] == sorted((c.bytes for c in changes), reverse=True)
    backwards = {c.name: c for c in diff(after, before)}
    for change in changes:
        assert backwards[change.name].compute_seconds == -change.compute_seconds
        assert backwards[change.name].before == change.after


def test_groups_hold_every_change_once(plans):
    changes = diff(plans[0], plans[2])
    groups = grouped(changes)
    assert sum(group.tensors for group in groups) == len(changes)
    assert sum(group.bytes for group in groups) == sum(change.bytes for change in changes)
    sorts = {(group.kind, group.before, group.after) for group in groups}
    assert len(sorts) == len(groups)
    assert ("weight", "unpacked", "streamed") in sorts


def test_what_is_written_no_more_is_a_change():
    before = by_hand()
    shorter = before.train.model_copy(update={"instructions": before.train.instructions[:-1]})
    (change,) = diff(before, before.model_copy(update={"train": shorter}))
    assert (change.name, change.kind, change.moved_bytes) == ("x", "batch", -PAGE)
    assert (change.compute_seconds, change.transfer_seconds) == (0, pytest.approx(-10e-3))


def test_groups_come_by_their_bytes():
    def change(name, kind, size):
        return PlanChange(
            name=name,
            kind=kind,
            bytes=size,
            before="kept",
            after="recomputed",
            compute_seconds=0.0,
            transfer_seconds=0.0,
            moved_bytes=0,
        )

    changes = [change("a", "activation", 5), change("t", "optimizer", 8), change("b", "activation", 4)]
    assert [(group.kind, group.tensors, group.bytes) for group in grouped(changes)] == [
        ("activation", 2, 9),
        ("optimizer", 1, 8),
    ]
    assert [group.kind for group in grouped(changes[:2])] == ["optimizer", "activation"]


def test_plans_of_two_models_are_refused(plans):
    other = ModelPlanner(decoder_like(2, tokens=128, slices=2, slice_rows=512)).plan(1 << 30, policy="keep-all")
    with pytest.raises(InputError, match="plans of synthetic and synthetic have other layers"):
        diff(plans[0], other)


def test_the_page_draws_one_diff_and_carries_the_data_of_all(plans):
    page = Page(comparison_page(plans))
    changes = diff(plans[0], plans[1])
    shown = page.find("tbody", id="diff-rows")[0]
    rows = [e for e in page.elements[page.elements.index(shown) + 1 :] if e["tag"] == "tr"][: len(changes)]
    assert shown["text"].startswith(changes[0].name)
    assert all(change.name in row["text"] for change, row in zip(changes, rows, strict=True))
    options = [e["text"] for e in page.find("option")]
    assert options == [f"{plan.policy} at 1024.0 MiB" for plan in plans] * 2
    assert [e["value"] for e in page.find("option") if "selected" in e] == ["0", "1"]
    packed = json.loads(page.find("script", id="drawn")[0]["text"])["timelines"]
    for plan, columns in zip(
        plans, [json.loads(gzip.decompress(base64.b64decode(one))) for one in packed], strict=True
    ):
        decided, names = columns["decided"], columns["tensors"]["name"]
        entries = list(zip(decided["tensor"], decided["decision"], strict=True))
        assert {names[t]: decided["decisions"][d] for t, d in entries if d >= 0} == plan.decisions
        compute = sum(decided["recompute"]) + sum(decided["unpack"])
        assert compute == pytest.approx(plan.train.recompute_seconds + plan.train.unpack_seconds, rel=1e-5)
        assert sum(decided["moved"]) == plan.train.read_bytes + plan.train.write_bytes


def test_one_plan_has_nothing_to_differ_from(plans):
    assert Page(comparison_page(plans[:1])).find("section", id="diff") == []
