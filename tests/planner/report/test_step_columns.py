"""The columns of a step, unfolded as the page's script unfolds them, say what the simulator says."""

from __future__ import annotations

import base64
import gzip
import itertools
import json

import pytest
from bare_graphs import graph_of
from layered_graph import layered
from small_steps import SMALL_STEPS, small_step

from tightfit.planner.plan import plan as solve
from tightfit.planner.report.costs import CostLedger
from tightfit.planner.report.step_columns import packed_columns, step_columns
from tightfit.profiles.graph_input import graph_profile


@pytest.fixture(scope="module", params=SMALL_STEPS)
def plan(request):
    return small_step(request.param)


@pytest.fixture(scope="module")
def columns(plan):
    return step_columns(plan)


def unfolded(columns):
    """Bytes of each kind after each instruction, and the seconds at which it ends."""
    tensors, instructions = columns["tensors"], columns["instructions"]
    kinds = [kind["name"] for kind in columns["kinds"]]
    held = dict.fromkeys(kinds, 0)
    events = {-1: []}
    for name, sign in (("went", -1), ("came", 1)):
        at = itertools.accumulate(columns[name]["instruction"])
        for index, tensor in zip(at, columns[name]["tensor"], strict=True):
            events.setdefault(index, []).append((tensor, sign))
    touched = list(itertools.accumulate(instructions["touched"]))
    moments, now = [], 0
    for index in range(-1, len(instructions["what"])):
        for tensor, sign in events.get(index, []):
            held[kinds[tensors["kind"][tensor]]] += sign * tensors["bytes"][tensor]
        if index < 0:
            continue
        now += instructions["wait"][index] + instructions["work"][index]
        by_kind = dict(held)
        if "floor" in by_kind:
            by_kind["floor"] = columns["floor"]
            by_kind["fragmentation"] = max(0, touched[index] - sum(held.values()))
        by_kind["constant"] = by_kind.get("constant", 0) + columns["fixed"]
        by_kind["workspace"] = instructions["workspace"][index]
        moments.append((now * columns["tick"], {kind: size for kind, size in by_kind.items() if size}))
    return moments


def check(plan, columns):
    moments = unfolded(columns)
    assert len(moments) == len(plan.train.instructions)
    assert plan.timeline
    for point in plan.timeline:
        seconds, by_kind = moments[point.instruction]
        if point.instruction == 0 and by_kind != point.by_kind:
            continue  # the state before the first instruction
        assert by_kind == point.by_kind, point.instruction
        assert seconds == pytest.approx(point.seconds, abs=2 * columns["tick"])


def test_bytes_and_seconds_are_the_simulators(plan, columns):
    check(plan, columns)
    assert columns["seconds"] == plan.train.seconds
    assert len(columns["decided"]["decisions"]) >= 2


def test_those_of_a_bare_graph():
    profile = graph_profile(layered(60, training=True))
    plan = solve(profile, 1 << 50, policy="checkpoint-sqrt")
    columns = step_columns(plan)
    check(plan, columns)
    assert columns["graph"]
    assert {what["name"] for what in columns["whats"]} >= {"forward", "backward", "again", "free"}


def test_a_graph_whose_operators_take_no_time_has_columns():
    operators = [
        {"name": name, "seconds": 0, "output_bytes": 10, "inputs": inputs} for name, inputs in (("a", []), ("b", ["a"]))
    ]
    columns = step_columns(solve(graph_of(operators), 1000, policy="keep-all"))
    assert columns["seconds"] == 0
    assert set(columns["instructions"]["work"]) == {0}


def test_each_tensors_costs_are_the_ledgers_and_the_other_ways_are_told(plan, columns):
    decided, names = columns["decided"], columns["tensors"]["name"]
    costs = CostLedger(plan).costs()
    assert {names[tensor] for tensor in decided["tensor"]} == costs.keys()
    for index, tensor in enumerate(decided["tensor"]):
        cost = costs[names[tensor]]
        decision = decided["decision"][index]
        assert (None if decision < 0 else decided["decisions"][decision]) == cost.decision
        assert decided["recompute"][index] == pytest.approx(cost.recompute_seconds, rel=1e-3)
        assert decided["read"][index] == pytest.approx(cost.read_seconds, rel=1e-3)
        if cost.decision == "recomputed" and cost.recompute_seconds:
            assert decided["make"][index] > 0
        if cost.decision == "offloaded" and cost.kind == "activation":
            # Written once and fetched once: what moving it costs is what it costs.
            assert decided["move"][index] == pytest.approx(cost.read_seconds + cost.write_seconds, rel=1e-3)


def test_transfers_name_their_tensors(plan, columns):
    instructions, transfers = columns["instructions"], columns["transfers"]
    at = list(itertools.accumulate(transfers["instruction"]))
    words = [columns["whats"][instructions["what"][index]]["name"] for index in at]
    assert set(words) <= {"read", "fetch", "spill"}
    assert [word == "spill" for word in words] == [out == 1 for out in transfers["out"]]
    assert all(columns["tensors"]["name"][instructions["of"][index]] for index in at)
    assert min(transfers["length"]) > 0


def test_packed_they_are_small(plan, columns):
    packed = packed_columns(plan)
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == json.loads(json.dumps(columns))
    assert len(packed) < len(json.dumps(columns)) / 2
