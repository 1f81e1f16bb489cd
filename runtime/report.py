"""The report of a run: predicted beside measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.schema import Phase, Plan


@dataclass
class Observed:
    """What the child told, message by message."""

    seconds: list[float] = field(default_factory=list)
    spent: list[dict[str, float]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    timelines: dict[str, list[list[float]]] = field(default_factory=dict)
    profiled: dict[str, Any] | None = None
    peak_bytes: int = 0
    spill_bytes: int = 0
    checkpoint: str | None = None
    trained: str | None = None
    resumed_step: int = 0
    cgroup_peak_bytes: int | None = None
    interrupted: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    def take(self, message: dict[str, Any]) -> None:
        event = message["event"]
        self.peak_bytes = max(self.peak_bytes, message.get("peak_bytes", 0))
        if event == "step":
            self.seconds.append(message["seconds"])
            self.spent.append(message["spent"])
        elif event == "loaded":
            self.spill_bytes = message["spill_bytes"]
        elif event == "resumed":
            self.resumed_step, self.checkpoint = message["step"], message["checkpoint"]
        elif event == "evaluated":
            self.evaluations[message["when"]] = {k: v for k, v in message.items() if k not in ("event", "when")}
        elif event == "timeline":
            self.timelines[message["which"]] = message["samples"]
        elif event == "profiled":
            self.profiled = message
        elif event == "checkpoint":
            self.checkpoint = message["path"]
        elif event == "saved":
            self.trained = message["path"]
        elif event == "done":
            self.peaks = message["peaks"]
        elif event == "interrupted":
            self.interrupted = message
        elif event == "error":
            self.error = message


def build_report(plan: Plan, observed: Observed, directory: Path, *, enforced_by: str) -> dict[str, Any]:
    """Bytes and seconds, predicted by the plan and measured in the run. `peak_bytes.measured` is the kernel's VmHWM.

    Step times are medians without the first step, which also touches memory and builds kernels for the first time; of steps
    that do not all do the same the mean of each sort's median.
    """
    sorts = _sorts(plan)
    names = observed.spent[0] if observed.spent else ()
    measured = {name: _typical([s[name] for s in observed.spent], observed.resumed_step, sorts) for name in names}
    lines = read_metrics(directory / "metrics.jsonl")
    seconds, first = observed.seconds, observed.resumed_step
    if not seconds:  # all steps were taken before
        seconds, first = [line["seconds"] for line in lines], 0
    report: dict[str, Any] = {
        "budget_bytes": plan.budget_bytes,
        "enforced_by": enforced_by,
        "floor_bytes": plan.floor_bytes,
        "peak_bytes": {"predicted": plan.peak_bytes, "measured": observed.peak_bytes},
        "step_seconds": {"predicted": plan.step_seconds, "measured": _typical(seconds, first, sorts)},
        "loss": [line["loss"] for line in lines],
        "adapter": observed.trained,
        "checkpoint": observed.checkpoint,
        "resumed_step": observed.resumed_step,
        "phases": {
            "train": _phase(plan.steps, observed.peaks.get("train"))
            | {
                "measured_seconds": {
                    "compute": measured.get("run"),
                    **{k: measured.get(k) for k in ("unpack", "perturb", "update", "stall")},
                }
            },
            "evaluate": _phase(
                [plan.evaluate] if plan.evaluate else [],
                max((v for k, v in observed.peaks.items() if k.startswith("evaluate")), default=None),
            ),
            **{
                name: {"peak_bytes": {"measured": peak}}
                for name, peak in observed.peaks.items()
                if name in ("load", "checkpoint")
            },
        },
        "evaluation": observed.evaluations,
        "spill_bytes": observed.spill_bytes,
        "cgroup_peak_bytes": observed.cgroup_peak_bytes,
        "policy": plan.policy,
        "plan_fingerprint": plan.fingerprint,
        "timeline": observed.timelines,
    }
    if observed.profiled:
        report["profiled_step"] = profiled_step(observed.profiled)
    return report


def _sorts(plan: Plan) -> list[int]:
    """Which sort each step is of, over a cycle or the steps of an update, of which only the last one moves trained tensors."""
    return list(range(len(plan.steps))) if plan.accumulate == 1 else [0] * (plan.accumulate - 1) + [1]


def _typical(taken: Sequence[float], first: int, sorts: Sequence[int]) -> float | None:
    """Mean over `sorts` of the medians of each; `taken` begin with step `first`, counted from 0."""
    steady = taken[1:] or taken
    by_sort: dict[int, list[float]] = {}
    for step, seconds in enumerate(steady, first + len(taken) - len(steady)):
        by_sort.setdefault(sorts[step % len(sorts)], []).append(seconds)
    medians = {sort: statistics.median(own) for sort, own in by_sort.items()}
    return statistics.fmean(medians[sort] for sort in sorts if sort in medians) if medians else None


PARTS = (
    ("aten.mm.", "matrix products"),
    ("aten.addmm.", "matrix products"),
    ("aten.bmm.", "matrix products"),
    ("tightfit.projection", "matrix products"),
    ("tightfit.lora_", "matrix products"),
    ("aten.convolution", "convolutions"),
    ("tightfit.attention", "attention"),
    ("tightfit.head_", "loss head"),
    ("tightfit.embed_rows", "embedding"),
    ("unpack", "unpacking weights"),
    ("update", "optimizer updates"),
    ("perturb", "perturbing trainables"),
)
"""Prefixes of what the executor calls, and the part of a step that it belongs to; anything else is elementwise."""


def profiled_step(message: dict[str, Any]) -> dict[str, Any]:
    """Where the seconds of one step went: `parts` adds up to `seconds`, `calls` has [calls, seconds] by operator."""
    parts: dict[str, float] = {}
    for name, (_, seconds) in message["calls"].items():
        part = next((part for prefix, part in PARTS if name.startswith(prefix)), "elementwise")
        parts[part] = parts.get(part, 0.0) + seconds
    parts["waiting for the disk"] = message["stall"]
    parts["Python and dispatch"] = max(0.0, message["seconds"] - sum(parts.values()))
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1]))
    calls = dict(sorted(message["calls"].items(), key=lambda item: -item[1][1]))
    return {"step": message["step"], "seconds": message["seconds"], "parts": ordered, "calls": calls}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The figures of every step so far, resumed runs included."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _phase(steps: Sequence[Phase], measured_peak: int | None) -> dict[str, Any]:
    """Of the schedules that run in turn: the largest predicted peak, and means of the rest.

    `peak_bytes.measured` is VmHWM at the end of the phase: it never falls, so it includes the phases before.
    """
    if not steps:
        return {}

    def mean(name: str) -> float:
        return statistics.fmean(getattr(step, name) for step in steps)

    names = ("compute_seconds", "recompute_seconds", "unpack_seconds", "stall_seconds")
    return {
        "peak_bytes": {"predicted": max(step.peak_bytes for step in steps), "measured": measured_peak},
        "predicted_seconds": {name.removesuffix("_seconds"): mean(name) for name in names},
        "instructions": round(statistics.fmean(len(step.instructions) for step in steps)),
        "read_bytes": round(mean("read_bytes")),
        "write_bytes": round(mean("write_bytes")),
    }
