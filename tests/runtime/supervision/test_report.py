"""The report from what a run told: which figure stands where."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_plans import decoder_profile, naive_plan

from tightfit.runtime.session.settings import _phase, planned_figures
from tightfit.runtime.supervision.report import (
    LATEST_STEPS,
    ObservedRun,
    _typical,
    _with_peak,
    build_report,
    token_figures,
)


def test_schedules_that_run_in_turn_have_the_largest_peak_and_the_mean_of_the_rest() -> None:
    def phase(number: int) -> Any:
        names = ("compute", "recompute", "unpack", "stall")
        seconds = {f"{name}_seconds": float(number + at) for at, name in enumerate(names)}
        return SimpleNamespace(
            peak_bytes=100 * number,
            read_bytes=10 * number,
            write_bytes=number,
            instructions=[["free", "x"]] * number,
            **seconds,
        )

    assert _with_peak(_phase([phase(1), phase(5), phase(3)], 40), 7) == {
        "peak_bytes": {"predicted": 460, "measured": 7},
        "predicted_seconds": {"compute": 3.0, "recompute": 4.0, "unpack": 5.0, "stall": 6.0},
        "instructions": 3,
        "read_bytes": 30,
        "write_bytes": 3,
    }
    assert _with_peak(_phase([], 40), 7) == {}


def test_the_first_step_counts_where_there_is_no_other() -> None:
    assert _typical([9.0, 1.0, 2.0], 0, [0]) == 1.5
    assert _typical([9.0], 0, [0]) == 9.0
    # Of two sorts in turn: the steps after step 3, which is the first.
    assert _typical([9.0, 1.0, 4.0, 1.0], 3, [0, 1]) == 2.5
    assert _typical([9.0, 1.0], 2, [0, 1]) == 1.0


def test_tokens_a_second_leave_padding_out() -> None:
    places = 32
    lines: list[dict[str, Any]] = [{"step": 1, "seconds": 9.0}, {"step": 2, "seconds": 7.0, "tokens": 4}]
    lines += [{"step": step, "seconds": 0.5, "tokens": 8} for step in (3, 4, 5)]
    # The first of those that say it is slower than the others; older versions did not say it.
    assert token_figures(places, lines) == {"per_step": 7.0, "per_second": 16.0, "padding_share": 1 - 7 / places}
    assert token_figures(places, lines[:2]) == {"per_step": 4.0, "per_second": 4 / 7, "padding_share": 1 - 4 / places}
    assert token_figures(places, lines[:1]) is None
    assert token_figures(None, lines) is None
    counted = [{**line, "samples": 3} for line in lines]
    assert token_figures(places, counted) == {**(token_figures(places, lines) or {}), "samples_per_second": 6.0}


def test_what_a_run_told_stands_where_it_belongs(tmp_path: Path) -> None:
    plan = naive_plan(decoder_profile(tmp_path / "store"))
    lines = [{"step": step, "loss": 4.0 - step, "seconds": float(step)} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("run", "unpack", "perturb", "update", "stall")
    peaks = {"load": 1, "train": 2, "checkpoint": 3, "evaluate": 4, "evaluate before": 6, "evaluate after": 5}
    told = [
        {"event": "resumed", "step": 2, "checkpoint": "checkpoint-2"},
        {"event": "loaded", "spill_bytes": 11, "peak_bytes": 5},
        {"event": "evaluated", "when": "before", "loss": 3.0, "peak_bytes": 12},
        {"event": "timeline", "which": "first", "samples": [[0, 0.1, 7]]},
        {"event": "step", "seconds": 9.0, "spent": dict.fromkeys(names, 8.0)},
        {"event": "step", "seconds": 1.0, "spent": {name: float(at) for at, name in enumerate(names)}},
        {"event": "saved", "path": "adapter"},
        {"event": "done", "peaks": peaks, "peak_bytes": 10},
    ]
    observed = ObservedRun()
    for message in told:
        observed.take(message)
    report = build_report(planned_figures(plan), observed, str(tmp_path), enforced_by="meter")
    assert report["loss"] == [3.0, 2.0, 1.0, 0.0]
    assert report["step_seconds"] == {"predicted": plan.step_seconds, "predicted_by": "model", "measured": 1.0}
    assert report["peak_bytes"] == {"predicted": plan.peak_bytes, "measured": 12}
    assert report["processes"] == {"training": report["peak_bytes"]}  # a program ran the plan, whose memory is its own
    assert (report["adapter"], report["checkpoint"], report["resumed_step"]) == ("adapter", "checkpoint-2", 2)
    assert (report["spill_bytes"], report["timeline"]) == (11, {"first": [[0, 0.1, 7]]})
    assert report["evaluation"] == {"before": {"loss": 3.0, "peak_bytes": 12}}
    phases = report["phases"]
    assert phases["train"]["peak_bytes"] == {"predicted": plan.train.peak_bytes, "measured": 2}
    seconds = {"compute": 0.0, "unpack": 1.0, "perturb": 2.0, "update": 3.0, "stall": 4.0}
    assert phases["train"]["measured_seconds"] == seconds
    assert phases["evaluate"]["peak_bytes"]["measured"] == 6
    assert {name: phases[name] for name in ("load", "checkpoint")} == {
        "load": {"peak_bytes": {"predicted": plan.peak_bytes, "measured": 1}},
        "checkpoint": {"peak_bytes": {"predicted": plan.peak_bytes, "measured": 3}},
    }
    # All steps were taken before: those that the metrics have.
    observed.seconds, observed.spent = [], []
    report = build_report(planned_figures(plan), observed, str(tmp_path), enforced_by="cgroup")
    assert report["step_seconds"]["measured"] == 3.0
    assert (report["enforced_by"], report["phases"]["train"]["measured_seconds"]["compute"]) == ("cgroup", None)
    # They begin with the first one, wherever the run was resumed: steps 3 and 6 make an update.
    lines = [{"step": at, "loss": 1.0, "seconds": seconds} for at, seconds in enumerate((1.0, 2.0, 3.0, 10.0, 7.0), 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summing = plan.model_copy(update={"optimizer": plan.optimizer | {"accumulate": 3, "state_tensors": 3}})
    observed.resumed_step = 1
    report = build_report(planned_figures(summing), observed, str(tmp_path), enforced_by="cgroup")
    assert report["step_seconds"]["measured"] == pytest.approx((2 * 7.0 + 3.0) / 3)


def test_the_peak_is_of_all_processes_that_the_run_keeps_alive(tmp_path: Path) -> None:
    plan = naive_plan(decoder_profile(tmp_path / "store"))
    floor = plan.device.floor.model_copy(update={"supervisor_bytes": 20})
    plan = plan.model_copy(update={"device": plan.device.model_copy(update={"floor": floor})})
    (tmp_path / "metrics.jsonl").write_text("")
    observed = ObservedRun(peak_bytes=1000, cgroup_peak_bytes=1015)
    planned = planned_figures(plan)
    report = build_report(
        planned, observed, str(tmp_path), enforced_by="cgroup", supervisor_bytes=19, preparation_bytes=70
    )
    assert report["processes"] == {
        "training": {"predicted": plan.peak_bytes - 20, "measured": 1000},
        "supervisor": {"predicted": 20, "measured": 19},
    }
    assert report["peak_bytes"] == {"predicted": plan.peak_bytes, "measured": 1019}
    assert (report["cgroup_peak_bytes"], report["preparation_bytes"]) == (1015, 70)


def test_a_long_run_is_remembered_in_the_memory_of_a_short_one(tmp_path: Path) -> None:
    observed = ObservedRun()
    for step in range(3 * LATEST_STEPS):
        seconds = 1.0 if step < LATEST_STEPS else 2.0 + step % 2
        observed.take({"event": "step", "seconds": seconds, "spent": {"run": seconds}})
    assert observed.steps == 3 * LATEST_STEPS
    assert {len(kept) for kept in (observed.seconds, observed.spent)} == {LATEST_STEPS}
    plan = naive_plan(decoder_profile(tmp_path / "store"))
    (tmp_path / "metrics.jsonl").write_text("")
    summing = plan.model_copy(update={"optimizer": plan.optimizer | {"accumulate": 2, "state_tensors": 3}})
    report = build_report(planned_figures(summing), observed, str(tmp_path), enforced_by="meter")
    assert report["step_seconds"]["measured"] == 2.5  # each sort by its place in the whole run
