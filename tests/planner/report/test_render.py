from __future__ import annotations

import io

import pytest
from rich.console import Console
from sample_plans import infeasible_plan, sample_plan, sample_plans

from tightfit.planner.report.explanation import account
from tightfit.planner.report.figures import _predicted_seconds, draw_curve, draw_timeline
from tightfit.planner.report.render import comparison_table, peak_table
from tightfit.planner.schema import TimelinePoint
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import MIB, parse_size
from tightfit.runtime.supervision.report_text import report_text


def printed(renderable, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def row(text, start):
    return next(line.split() for line in text.splitlines() if line.strip().startswith(start))


def test_comparison_table():
    text = printed(comparison_table(sample_plans()))
    assert row(text, "budget") == ["budget", "solver", "keep-all", "mebp"]
    assert row(text, "250.0") == ["250.0", "MiB", "1.280", "needs", "640.0", "needs", "262.0"]
    assert row(text, "800.0") == ["800.0", "MiB", "0.950", "0.950", "1.700"]


@pytest.mark.parametrize("width", [80, 60, 40])
def test_a_narrow_terminal_cuts_nothing(width):
    rules = ["keep-all", "checkpoint-layers", "checkpoint-sqrt", "mebp", "mesp", "lcsb"]
    plans = [infeasible_plan(rule, minimum=int((1140.3 + i) * MIB)) for i, rule in enumerate(rules)]
    solved = sample_plan(budget=250 * MIB, status="feasible", gap=0.031, ended_by="time limit")
    text = printed(comparison_table([solved, *plans]), width)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    if width == 80:
        assert {"checkpoint-", "layers", "1.250", "(gap", "3.10%,", "time", "limit)", "1140.3", "1145.3"} <= set(
            text.split()
        )
        assert text.split().count("needs") == len(rules)


def test_a_table_says_what_is_not_proven_and_where_the_time_limit_ended_a_search():
    def cell(**changes):
        return row(printed(comparison_table([sample_plan(budget=250 * MIB, **changes)]), 200), "250.0")[2:]

    assert cell() == ["1.250"]
    assert cell(status="feasible", gap=0.002, ended_by="stalled") == ["1.250", "(gap", "0.20%)"]
    assert cell(status="feasible", gap=0.002, ended_by="time limit") == ["1.250", "(gap", "0.20%,", "time", "limit)"]
    short = infeasible_plan("solver").model_copy(update={"status": "unknown"})
    assert "needs 412.4 or less" in printed(comparison_table([short]), 200)


def test_a_table_names_its_device():
    assert "cpu-test, measured: seconds per step" in printed(comparison_table(sample_plans()))
    there = sample_plan().device.model_copy(update={"name": "[b]phone", "measured": False})
    assert "[b]phone, estimated" in printed(comparison_table([sample_plan(device=there, seconds=0.004321)]))
    assert "0.00432" in printed(comparison_table([sample_plan(device=there, seconds=0.004321)]))


def test_a_smallest_budget_is_rounded_up():
    text = printed(comparison_table([infeasible_plan("keep-all", minimum=int(412.34 * MIB))]))
    assert row(text, "250.0")[2:] == ["needs", "412.4"]


def test_peak_table_adds_up_to_the_peak():
    kinds = ("Python", "trainables", "optimizer", "weights", "activations", "workspace", "at other moments")
    text = printed(peak_table(sample_plan(), account(sample_plan())))
    parts = [parse_size("".join(row(text, start)[-3:-1])) for start in kinds]
    assert row(text, "together")[1:] == ["340.0", "MiB", "of", "350.0", "MiB"]
    assert sum(parts) == pytest.approx(340 * MIB, abs=0.4 * MIB)
    assert row(text, "workspace")[1:3] == ["1.0", "MiB"]
    assert " 0.0 MiB" not in text


def test_peak_table_of_a_small_graph_is_told_in_bytes():
    point = TimelinePoint(instruction=0, seconds=1.0, bytes=20, by_kind={"activation": 20})
    whole = sample_plan().device
    floor = whole.floor.model_copy(update={"import_peak_bytes": 0, "resident_bytes": 0, "supervisor_bytes": 0})
    device = whole.model_copy(update={"floor": floor})  # as of a graph, which no process runs
    plan = sample_plan(budget=2000, peak=20, timeline=[point], device=device)
    text = printed(peak_table(plan, account(plan)))
    assert row(text, "activations")[1:3] == ["20", "B"]
    assert row(text, "together")[1:] == ["20", "B", "of", "2.0", "KiB"]


def test_peak_table_of_an_infeasible_plan_is_empty():
    assert "together" not in printed(peak_table(infeasible_plan(), account(infeasible_plan())))


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml")])
def test_pictures(tmp_path, suffix, magic):
    curve = draw_curve(sample_plans(), tmp_path / f"deep/curve.{suffix}")
    samples = [(i, 225 * MIB + i * MIB) for i in range(48)]
    timeline = draw_timeline(sample_plan(), tmp_path / f"timeline.{suffix}", measured=samples, measured_peak=339 * MIB)
    for path in (curve, timeline):
        assert path.read_bytes().startswith(magic)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", f"timeline.{suffix}"]


def test_a_picture_per_device(tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    there = sample_plan().device.model_copy(update={"name": "phone"})
    plans = sample_plans() + [plan.model_copy(update={"device": there}) for plan in sample_plans()]
    text = draw_curve(plans, tmp_path / "two.svg").read_text()
    assert text.count("seconds per step") == 2
    assert ">phone<" in text
    assert ">cpu-test<" in text


def test_the_timeline_names_what_it_shows(tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    path = draw_timeline(sample_plan(), tmp_path / "t.svg", measured=[(0, 1), (40, 2)], measured_peak=339 * MIB)
    text = path.read_text()
    for words in (
        "cap 350.0 MiB",
        "measured peak of the run (VmHWM), 339.0 MiB",
        "measured resident set",
        "predicted peak of the run, 340.0 MiB",
        "optimizer state",
        "weights, unpacked",
        "Python and PyTorch",
    ):
        assert words in text, words


def test_other_picture_formats_are_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        draw_curve(sample_plans(), tmp_path / "curve.jpg")
    assert str(caught.value) == f"{tmp_path}/curve.jpg: pictures are written as .png or .svg; name such a file"


def test_an_infeasible_plan_has_no_timeline(tmp_path):
    with pytest.raises(InputError, match=r"a plan that is infeasible at 250\.0 MiB has no timeline to draw"):
        draw_timeline(infeasible_plan(), tmp_path / "t.png")


def test_measured_samples_stand_where_the_plan_has_their_instruction():
    timeline = [
        TimelinePoint(instruction=i, seconds=s, bytes=1, by_kind={}) for i, s in ((0, 0.1), (10, 0.2), (30, 0.6))
    ]
    plan = sample_plan(timeline=timeline)
    assert [_predicted_seconds(plan, i) for i in (0, 5, 10, 20, 30, 99)] == pytest.approx(
        [0.1, 0.15, 0.2, 0.4, 0.6, 0.6]
    )


@pytest.mark.parametrize("name", ["adapter", "model"])
def test_a_report_names_what_was_trained(name):
    figures = {"predicted": 2.0, "measured": 1.0}
    report = {
        "peak_bytes": figures, "step_seconds": figures | {"predicted_by": "model"}, "budget_bytes": 1 << 30, "enforced_by": "cgroup",
        "processes": {"training": figures}, "phases": {}, "loss": [2.0, 1.0], "adapter": f"/out/{name}",
    }  # fmt: skip
    assert f"\n{name}" in printed(report_text(report))
