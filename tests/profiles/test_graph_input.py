"""Bare graphs as other tools write them: read with messages that name the field, planned and compared, never run."""

from __future__ import annotations

import json
import re

import pytest
from broken_plans import changed, rejected
from places import ROOT

from tightfit.planner.compare import compare
from tightfit.planner.io import load_plan
from tightfit.planner.plan import plan
from tightfit.planner.report.explain import explain
from tightfit.planner.simulation.simulate import InvalidSchedule, simulate
from tightfit.profiles.api import load_profile, save_profile
from tightfit.profiles.graph_input import FIXED, parse_graph
from tightfit.runtime.cli.main import main
from tightfit.runtime.common.errors import InputError

EXAMPLE = ROOT / "examples" / "bare-graph.json"


def graph(*operators, **fields):
    return {"format": "tightfit-graph", "operators": list(operators)} | fields


def op(name, *inputs, **fields):
    return {"name": name, "seconds": 1, "output_bytes": 10, "inputs": list(inputs)} | fields


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (graph(op("a"), op("b", "a", seconds=-1)), "field operators.1.seconds (operator 'b'): Input should be greater"),
        (
            graph(op("a"), op("b", "a", output_bytes="x")),
            "field operators.1.output_bytes (operator 'b'): Input should be a",
        ),
        (graph(op("a"), {"seconds": 1, "output_bytes": 1}), "field operators.1.name: Field required"),
        (graph(op("a"), op("b", speed=3)), "field operators.1.speed (operator 'b'): Extra inputs"),
        (
            graph(op("a"), op("b", seconds=float("inf"))),
            "field operators.1.seconds (operator 'b'): Input should be a finite",
        ),
        (graph(op("a"), op("b", "c")), "field operators.1.inputs (operator 'b'): 'c' is no operator of the graph"),
        (graph(op("a"), op("a")), "field operators.1.name: 'a' is taken by operator 0"),
        (graph(op("a", "c"), op("b", "a"), op("c", "b"), op("d")), "the operators' inputs form a cycle: "),
        (graph(op("a", "a"), op("b")), "the operators' inputs form a cycle: a → a"),
        (graph(op("a")), "field operators: 1 operators; a graph has 2 to 10000"),
        (graph(op("a", phase="forward"), op("b")), "field operators.1.phase (operator 'b'): missing"),
        (
            graph(op("a", "b", phase="forward"), op("b", phase="backward")),
            "field operators.0.inputs (operator 'a'): a forward operator reads 'b', which is backward",
        ),
        (graph(op("a"), op("b"), fixed_bytes=-1), "field fixed_bytes: Input should be greater"),
        (
            graph(op("a"), op("b"), read={"bytes_per_second": 1e9}),
            "field write: missing, while read is given; give both, or neither",
        ),
        (
            graph(op("a"), op("b"), read={"bytes_per_second": 0}, write={"bytes_per_second": 1}),
            "field read.bytes_per_second: Input should be greater than or equal to 0.001",
        ),
        (
            graph(op("a"), op("b"), write={"bytes_per_second": 1e-320}, read={"bytes_per_second": 1}),
            "field write.bytes_per_second: Input should be greater than or equal to 0.001 (got",
        ),
        (
            graph(op("a"), op("b"), read={"bytes_per_second": 1, "latency_seconds": 1e13}),
            "field read.latency_seconds: Input should be less than or equal to 1000000000000 (got",
        ),
        (
            graph(op("a"), op("b", seconds=1e308)),
            "field operators.1.seconds (operator 'b'): Input should be less than or equal to 1000000000000 (got",
        ),
        (graph(op("a"), op("b"), format="dot"), "field format is 'dot'; write \"tightfit-graph\""),
        (graph(op("a"), op("b"), version=2), "graph version 2, this tightfit reads version 1"),
        (
            graph(op("a"), op("b", seconds="1.0")),
            "field operators.1.seconds (operator 'b'): Input should be a valid number (got '1.0')",
        ),
        (
            graph(op("a"), op("b", workspace_bytes=True)),
            "field operators.1.workspace_bytes (operator 'b'): Input should be a valid integer (got True)",
        ),
        (
            graph(op("a"), op("b", output_bytes=10.5)),
            "field operators.1.output_bytes (operator 'b'): Input should be a valid integer",
        ),
        (
            graph(op("a"), op("b", recomputable="no")),
            "field operators.1.recomputable (operator 'b'): Input should be a valid boolean (got 'no')",
        ),
        (graph(op("a"), op("b"), fixed_bytes="7"), "field fixed_bytes: Input should be a valid integer (got '7')"),
        (graph(op("a"), op("b"), version=True), "field version: Input should be a valid integer (got True)"),
        (
            graph(op("a"), op("b"), read={"bytes_per_second": "1e9"}),
            "field read.bytes_per_second: Input should be a valid number (got '1e9')",
        ),
        ({"format": "tightfit-graph"}, "field operators: Field required (got"),
        ({"format": "tightfit-graph", "layers": []}, "field operators: Field required (got"),
        ({"operators": [op("a"), op("b")]}, 'field format is missing; write "tightfit-graph"'),
        ([op("a"), op("b")], 'a list of 2, no graph; write {"format": "tightfit-graph", "operators": [...]}'),
        ([], "not a profile (no 'layers') and no graph (no 'operators')"),
        (graph(op("a"), "b"), "field operators.1: Input should be a valid dictionary"),
    ],
)
def test_what_is_wrong_is_named(data, said, tmp_path):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_whole_numbers_may_be_written_as_floats():
    data = graph(op("a"), op("b", "a", workspace_bytes=4), fixed_bytes=7)
    floats = graph(op("a", output_bytes=10.0), op("b", "a", workspace_bytes=4.0), fixed_bytes=7.0, version=1.0)
    assert parse_graph(floats) == parse_graph(data)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ('"seconds": 2', "field seconds (operator 'b'): given twice, 1 and 2; correct it"),
        ('"name": "c"', "field name (operator 'c'): given twice, 'b' and 'c'; correct it"),
    ],
)
def test_a_field_given_twice_is_refused(tmp_path, field, said):
    path = tmp_path / "graph.json"
    text = json.dumps(graph(op("a"), op("b")))
    path.write_text(f"{text[:-3]}, {field}}}]}}")
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    path.write_text(f'{text[:-1]}, "name": "x", "name": "y"}}')
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: field name: given twice, 'x' and 'y'; correct it")


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, content):
    path = tmp_path / "graph.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_profile(path)
    again = "make a profile again with `tightfit profile`, a graph with the tool that writes it"
    assert str(caught.value) == f"{path}: empty; {again}"


@pytest.mark.parametrize("size", [1, 8, 30, 43, 62, 69, 78, 132, -2, -1])
def test_where_a_file_is_cut_is_told(tmp_path, size):
    path = tmp_path / "graph.json"
    content = json.dumps(graph(op("ä", recomputable=True), op("b")), ensure_ascii=False).encode()[:size]
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_profile(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: not JSON, perhaps truncated (cut at byte {len(content)}: ")
    graphs = "; write it again with the tool that made the graph"
    assert said.endswith(graphs if size not in (1, 8) else "`tightfit profile`, a graph with the tool that writes it")


def test_what_is_no_json_in_its_middle_is_not_said_to_be_cut(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text('{"format": "tightfit-graph", "operators": [nothing]}')
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: not JSON, perhaps truncated (Expecting value: line 1 column 44")


@pytest.mark.parametrize(("data", "kind"), [(None, "null"), ([], "a list of 0"), ([op("a")], "a list of 1"), (3, "3")])
def test_what_is_no_object_is_no_graph(data, kind):
    with pytest.raises(InputError) as caught:
        parse_graph(data)
    assert str(caught.value).startswith(f'graph: {kind}, no graph; write {{"format": "tightfit-graph", "operators"')


def test_the_given_order_stays_but_for_inputs_that_come_later():
    found = parse_graph(graph(op("d", "b"), op("a"), op("c"), op("b", "a")))
    assert [value.name for value in found.programs[0].values] == ["a", "c", "b", "d"]


def test_a_graph_is_the_same_profile_wherever_its_file_lies():
    data = graph(op("a"), op("b", "a"))
    assert parse_graph(data, "here.json") == parse_graph(data, "the upload")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_graphs_are_read_as_programs_for_windows_write_them(tmp_path, encoding):
    data = graph(op("ä"), op("b", "ä"))
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding=encoding)
    assert load_profile(path) == parse_graph(data)


def test_times_of_a_graph_are_those_of_its_device_alone():
    with pytest.raises(InputError) as caught:
        compare(load_profile(EXAMPLE), [1 << 30], devices=["phone"])
    assert str(caught.value) == (
        "the bare graph five convolutions, one training step states no FLOPs, so its times on phone cannot be estimated;"
        " leave the device out, or write a graph with its operators' seconds on phone"
    )  # it has no field for them


@pytest.mark.slow
def test_a_graph_of_ten_thousand_operators_is_read_planned_and_simulated():
    operators = [op("op0"), *(op(f"op{i}", f"op{i - 1}") for i in range(1, 10_000))]
    planned = plan(parse_graph(graph(*operators)), 20)
    assert (planned.status, planned.step_seconds, planned.peak_bytes) == ("optimal", 10_000, 20)
    short = plan(parse_graph(graph(*operators)), 19)
    assert (short.status, short.minimum_budget_bytes) == ("infeasible", 20)


def test_where_nothing_fits_nothing_is_said_to_stay():
    fits, short = (plan(parse_graph(graph(op("a"), op("b", "a"), fixed_bytes=5)), budget) for budget in (25, 24))
    assert (fits.status, list(fits.resident)) == ("optimal", [FIXED])
    assert (short.status, short.minimum_budget_bytes) == ("infeasible", 25)
    assert (short.resident, short.decisions, short.steps) == ({}, {}, [])


def test_profiles_of_graphs_are_read_back(tmp_path):
    profile = load_profile(EXAMPLE)
    save_profile(profile, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile


def run(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return left.value.code, out, err


@pytest.mark.slow
def test_the_example_is_planned_compared_and_refused_to_run(capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, "plan", EXAMPLE, "--memory", "740MB", "-o", path, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["peak_bytes"] <= 740_000_000
    loaded = load_plan(path)
    assert simulate(loaded).peak_bytes == told["peak_bytes"]
    text = " ".join(explain(loaded))
    assert "Python" not in text
    assert re.search(r"making 2 activations of [\d.]+ MiB together again costs", text)
    code, out, _ = run(
        capsys, "compare", EXAMPLE, "--memory", "600MB,740MB,1GB", "--html", tmp_path / "c.html", "--json"
    )
    plans = {(p["policy"], p["budget_bytes"]): p for p in json.loads(out)["plans"]}
    assert code == 0
    assert plans["keep-all", 740_000_000]["status"] == "infeasible"
    assert plans["checkpoint-sqrt", 740_000_000]["step_seconds"] >= told["step_seconds"]
    code, _, err = run(capsys, "run", path, "--data", "random", "--steps", "1", "-o", tmp_path / "out")
    assert code == 2
    assert err.startswith("tightfit: the plan is of a bare graph (five convolutions, one training step)")


def test_a_graph_that_takes_no_time_and_no_memory_is_compared(capsys, tmp_path):
    path = tmp_path / "graph.json"
    nothing = {"seconds": 0, "output_bytes": 0}
    path.write_text(json.dumps(graph(op("a", **nothing), op("b", "a", **nothing))))
    code, out, _ = run(capsys, "compare", path, "--memory", "10B,20B")
    assert code == 0
    assert "keep-all, the fastest fixed rule that fits, needs 0.000 s." in " ".join(out.split())
    code, out, _ = run(capsys, "compare", path, "--memory", "10B,20B", "--json", "--html", tmp_path / "c.html")
    assert code == 0
    assert {plan["step_seconds"] for plan in json.loads(out)["plans"]} == {0.0}
    assert "needs 0.000 s." in (tmp_path / "c.html").read_text()


def test_a_graph_of_the_longest_operators_is_planned_in_figures(capsys, tmp_path):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph(op("a", seconds=1e12), op("b", "a", seconds=1e12))))
    code, out, _ = run(capsys, "plan", path, "--memory", "20B", "-o", tmp_path / "plan.json", "--json")
    assert (code, json.loads(out)["step_seconds"]) == (0, 2e12)
    assert json.loads(out)["gap"] == 0.0


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        (lambda found: found.pop(0), "operator-order"),
        (lambda found: found.insert(1, ["free", "a"]), "use-before-resident"),
        (lambda found: found.insert(1, ["free", "c"]), "double-free"),
        (lambda found: found.insert(1, ["run", "graph", 0, [None]]), "already-resident"),
        (lambda found: found.remove(["free", "b"]), "leak"),
        (lambda found: found.insert(3, ["spill", "a"]), "form"),
        (lambda found: found.extend([["free", "c"]]), "leak"),
        (lambda found: found.append(["run", "graph", 0, [0]]), "form"),
        (lambda found: found.append(["run", "graph", 1, [None]]), "operator-order"),
    ],
)
def test_the_simulator_refuses_broken_schedules(change, invariant):
    made = plan(
        parse_graph(graph(op("a"), op("b", "a", recomputable=False), op("c", "a", "b", keep_until_end=True))), 30
    )
    rejected(changed(made, change), invariant)


def test_the_simulator_holds_the_budget():
    made = plan(parse_graph(graph(op("a"), op("b", "a"), fixed_bytes=7)), 27)
    assert made.peak_bytes == 27
    with pytest.raises(InvalidSchedule, match=r"\(budget\).*27 bytes at the peak, 26 allowed"):
        simulate(made.model_copy(update={"budget_bytes": 26}))
