"""Builds and writes the report of a run: what the plan predicted beside what the run measured.

The standard library only: the process that writes it counts against the budget.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.run_folder import writing_to

LATEST_STEPS = 500
"""the number of latest steps whose seconds are remembered, so that a run of any length needs the same memory"""

ALONE = "alone"
"""the `when` of the only evaluation of a run that takes no step"""
LARGEST_EXPONENT = 709.0
"""the largest x for which e ** x is a float"""

EVALUATION_KEYS = {
    "step": "step",
    "epoch": "epoch",
    "loss": "eval_loss",
    "accuracy": "eval_accuracy",
    "seconds": "eval_seconds",
}
"""figures of an evaluation: name in the report -> name in the metrics"""
OF_PAIRS = ("pairs", "reward_accuracy", "reward_margin")
"""further figures of an evaluation on pairs of answers; its metrics have the last two, as ``eval_reward_accuracy``
...
"""
FLEET_SECONDS = ("seconds", "exchange_seconds", "update_seconds")
"""seconds of a fleet's update: since the update before, of the exchange, of making the update"""


@dataclass
class ObservedRun:
    """The figures in the training process's messages so far; seconds are kept for the latest `LATEST_STEPS` steps
    only.
    """

    steps: int = 0
    """number of steps taken so far, without those of a run that was resumed"""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST_STEPS))
    spent: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=LATEST_STEPS))
    updates: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST_STEPS))
    """seconds of the latest updates, where gradients are clipped"""
    peaks: dict[str, int] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """results before the first step and after the last; those between are in the metrics"""
    best: dict[str, Any] | None = None
    """step, loss and accuracy of the best evaluation, where some were made between the steps"""
    over: bool = False
    """whether the run ended early, since its evaluations stopped getting better"""
    timelines: dict[str, list[list[float]]] = field(default_factory=dict)
    exchanges: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=LATEST_STEPS))
    """what the member of a fleet said about the latest updates"""
    peak_bytes: int = 0
    spill_bytes: int = 0
    checkpoint: str | None = None
    trained: str | None = None
    referred: dict[str, Any] | None = None
    """pairs and seconds of the reference log-probabilities that were computed before the steps, if any were"""
    resumed_step: int = 0
    cgroup_peak_bytes: int | None = None
    interrupted: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    def take(self, message: dict[str, Any]) -> None:
        event = message["event"]
        self.peak_bytes = max(self.peak_bytes, message.get("peak_bytes", 0))
        if event == "step":
            self.steps += 1
            self.seconds.append(message["seconds"])
            self.spent.append(message["spent"])
            if "update_seconds" in message:
                self.updates.append(message["update_seconds"])
        elif event == "exchanged":
            self.exchanges.append({name: message[name] for name in FLEET_SECONDS})
        elif event == "loaded":
            self.spill_bytes = message["spill_bytes"]
        elif event == "resumed":
            self.resumed_step, self.checkpoint = message["step"], message["checkpoint"]
        elif event == "evaluated" and message["when"] != "between":
            self.evaluations[message["when"]] = {k: v for k, v in message.items() if k not in ("event", "when")}
        elif event == "timeline":
            self.timelines[message["which"]] = message["samples"]
        elif event == "referred":
            self.referred = {
                "pairs": message["pairs"],
                "seconds": {"predicted": message["expected"], "measured": message["seconds"]},
            }
        elif event == "checkpoint":
            self.checkpoint = message["path"]
        elif event == "saved":
            self.trained = message["path"]
        elif event == "done":
            self.peaks = message["peaks"]
            self.best, self.over = message.get("best"), message.get("over", False)
        elif event == "interrupted":
            self.interrupted = message
        elif event == "error":
            self.error = message


def build_report(
    planned: dict[str, Any],
    observed: ObservedRun,
    directory: str,
    *,
    enforced_by: str,
    supervisor_bytes: int | None = None,
    program_bytes: int | None = None,
    preparation_bytes: int | None = None,
    stage_bytes: dict[str, list[int | None]] | None = None,
    contention: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The report: bytes and seconds as `planned` (by `planned_figures`) and as measured in the run.

    `peak_bytes` covers the processes that live during training: the sum of each one's VmHWM, in which memory that they
    share (Python's code) counts twice. `processes` lists them: the training process, and the supervisor
    (`supervisor_bytes`, its VmHWM). If a program of the user's runs the plan itself, there is no supervisor; the
    program's memory does not count against the budget and is reported as `program_bytes`. `cgroup_peak_bytes` is the
    cgroup's own counter, which includes kernel tables and reclaimable page cache. `preparation_bytes` is the peak of
    the process that read plan and data before the training process was started, and `stage_bytes` has what the stages
    of `tightfit train` before it were predicted to hold, and have held. `contention` says how long steps waited for
    cores that other programs held (`tightfit.runtime.supervision.contention`); None: there was nothing to notice.

    `evaluations` are those of a run that evaluates between its steps, each with `step`, `epoch`, `loss`, `accuracy`
    (None without questions) and `seconds`; `best` is the best of them, with the `path` where its result is kept;
    `stopped_early` is the step after which the run ended because they were no better any more.

    `step_seconds` say whether the plan's rehearsal or its model predicted them, and whether that was measured beside
    other programs. Step times are medians over the latest `LATEST_STEPS` steps, without the first one, which touches
    memory and builds kernels for the first time. If steps are of different sorts, the time is the mean of each sort's
    median.

    Where a loss compares with the model without its adapter, `references` has the pairs for which that was computed
    before the first step of this start, and its seconds.

    Where gradients are clipped, `grad_norm` has the norm before that of every update, and `phases` their update.
    """
    sorts = planned["sorts"]
    metrics = read_metrics(os.path.join(directory, "metrics.jsonl"))
    lines = [line for line in metrics if "loss" in line]
    seconds: Sequence[float] = list(observed.seconds)
    first = observed.resumed_step + observed.steps - len(seconds)
    names = observed.spent[0] if observed.spent else ()
    measured = {name: _typical([spent[name] for spent in observed.spent], first, sorts) for name in names}
    if not seconds:  # an earlier run took all the steps
        seconds, first = [line["seconds"] for line in lines], 0
    training = {"predicted": planned["peak_bytes"] - planned["supervisor_bytes"], "measured": observed.peak_bytes}
    processes = {"training": training}
    if supervisor_bytes is not None:
        processes["supervisor"] = {"predicted": planned["supervisor_bytes"], "measured": supervisor_bytes}
    report: dict[str, Any] = {
        "budget_bytes": planned["budget_bytes"],
        "enforced_by": enforced_by,
        "floor_bytes": planned["floor_bytes"],
        "peak_bytes": {kind: sum(each[kind] for each in processes.values()) for kind in ("predicted", "measured")},
        "processes": processes,
        "program_bytes": program_bytes,
        "preparation_bytes": preparation_bytes,
        "stage_bytes": (
            None
            if stage_bytes is None
            else {stage: dict(zip(("predicted", "measured"), sizes)) for stage, sizes in stage_bytes.items()}
        ),
        "step_seconds": {
            "predicted": planned["expected_seconds"],
            "predicted_by": planned["expected_by"],
            "measured": _typical(seconds, first, sorts),
        },
        "contention": contention,
        "tokens": token_figures(planned["places_per_step"], lines),
        "packing": planned.get("packing"),
        "loss": [line["loss"] for line in lines],
        "epochs": next((line["epoch"] for line in reversed(lines) if "epoch" in line), None),
        "adapter": observed.trained,
        "checkpoint": observed.checkpoint,
        "resumed_step": observed.resumed_step,
        "phases": {
            "train": (
                _with_peak(planned["train"], observed.peaks.get("train"))
                | {
                    "measured_seconds": {
                        "compute": measured.get("run"),
                        **{k: measured.get(k) for k in ("unpack", "perturb", "update", "stall")},
                    }
                }
            ),
            "evaluate": _with_peak(
                planned["evaluate"],
                max((v for k, v in observed.peaks.items() if k.startswith("evaluate")), default=None),
            ),
            **{
                name: {"peak_bytes": {"predicted": training["predicted"], "measured": peak}}
                for name, peak in observed.peaks.items()
                if name in ("load", "checkpoint")
            },
        },
        "evaluation": observed.evaluations,
        "evaluations": evaluation_figures(metrics),
        "best": best_figures(observed.best, directory),
        "stopped_early": max((line["step"] for line in lines), default=0) if observed.over else None,
        "spill_bytes": observed.spill_bytes,
        "cgroup_peak_bytes": observed.cgroup_peak_bytes,
        "policy": planned["policy"],
        "plan_fingerprint": planned["plan_fingerprint"],
        "base": planned.get("base"),
        "ignored_state": planned.get("ignored_state", []),
        "timeline": observed.timelines,
    }
    if observed.referred:
        report["references"] = observed.referred
    if planned.get("max_grad_norm") is not None:
        updates = list(observed.updates)[1:] or list(observed.updates)
        report["max_grad_norm"] = planned["max_grad_norm"]
        report["grad_norm"] = [line["grad_norm"] for line in lines if "grad_norm" in line]
        report["phases"]["train"]["measured_seconds"]["accumulate"] = measured.get("accumulate")
        report["phases"]["update"] = _with_peak(planned["update"], observed.peaks.get("update")) | {
            "seconds": {"predicted": planned["update_seconds"], "measured": _typical(updates, 0, [0])}
        }
    if planned.get("fleet"):
        report["fleet"] = fleet_figures(planned["fleet"], list(observed.exchanges), directory)
    return report


def evaluation_report(report: dict[str, Any], *, by_token: bool) -> dict[str, Any]:
    """The result of `tightfit eval`, made of the `report` of a run that evaluated once and took no step. `by_token`:
    its loss is a mean over tokens, as that of a decoder.
    """
    import math  # as `statistics` below: once the training process has ended

    memory = ("budget_bytes", "enforced_by", "floor_bytes", "peak_bytes", "processes", "program_bytes")
    run_keys = (*memory, "preparation_bytes", "stage_bytes", "cgroup_peak_bytes", "packing", "base", "plan_fingerprint")
    (evaluation,) = report["evaluation"].values()
    figures = {name: evaluation[name] for name in ("loss", "accuracy", "questions", "records", "seconds")}
    figures |= {name: evaluation[name] for name in OF_PAIRS if name in evaluation}
    by_token = by_token and "pairs" not in evaluation
    finite = by_token and figures["loss"] < LARGEST_EXPONENT
    return {
        "loss": figures["loss"],
        "perplexity": math.exp(figures["loss"]) if finite else None,
        **figures,
        **{name: report[name] for name in run_keys},
    }


def fleet_figures(planned: dict[str, Any], exchanges: Sequence[dict[str, float]], directory: str) -> dict[str, Any]:
    """The part of a member's report about its fleet: who it is, and seconds of an update as `planned` and as measured.

    Measured are medians without the first update, which includes the start. `loss` has the losses of all micro-batches;
    `result` says in words what comes of the run, where that is no adapter.
    """
    import statistics

    steady = exchanges[1:] or exchanges
    seconds = {
        name: {
            "predicted": planned[name],
            "measured": statistics.median(exchange[name] for exchange in steady) if steady else None,
        }
        for name in FLEET_SECONDS
    }
    lines = read_metrics(os.path.join(directory, "fleet.jsonl"))
    figures = {name: planned[name] for name in ("member", "members", "micro_batches", "share")}
    if "result" in planned:
        figures["result"] = planned["result"]
    return {**figures, **seconds, "updates": len(lines), "loss": [loss for line in lines for loss in line["losses"]]}


def evaluation_figures(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among the lines of the metrics, by step."""
    by_step = {line["step"]: line for line in metrics if "eval_loss" in line}
    return [
        {name: line.get(key) for name, key in EVALUATION_KEYS.items()}
        | {name: line[f"eval_{name}"] for name in OF_PAIRS if f"eval_{name}" in line}
        for line in (by_step[step] for step in sorted(by_step))
    ]


def best_figures(best: dict[str, Any] | None, directory: str) -> dict[str, Any] | None:
    """The best evaluation with the `path` of its result (None: it is not kept)."""
    path = os.path.join(directory, "best")
    return best and {**best, "path": path if os.path.isdir(path) else None}


def already_done(report: dict[str, Any], directory: str, steps: int | None) -> str:
    """The message for a resumed run that has nothing left to do."""
    if early := report.get("stopped_early"):
        best = report["best"]["step"]
        waited = sum(evaluation["step"] > best for evaluation in report["evaluations"])
        return (
            f"already done: {directory} ended early after step {early}, since {waited} evaluations in a row were no"
            f" better than that after step {best}; give a larger {spelled('early_stopping')}, or none, to go on\n"
        )
    return f"already done: {directory} has all {steps} steps; give more {spelled('steps')} to go on\n"


def write_report(directory: str, report: dict[str, Any]) -> None:
    with writing_to(directory), open(os.path.join(directory, "report.json"), "w", encoding="utf-8") as file:
        file.write(json.dumps(report, indent=1) + "\n")


def token_figures(places: int | None, lines: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Token figures from the metrics' `lines`: `per_step` and `per_second` without padding, `padding_share`, and
    `samples_per_second` if the lines tell.

    `places` is the number of positions in a step's rows, padding included. None if tokens are unknown, as for a module.
    The first step, which is slower, is left out of the rate if there are others.
    """
    counted = [line for line in lines if "tokens" in line]
    if not counted or not places:
        return None
    steady = counted[1:] or counted
    per_step = sum(line["tokens"] for line in counted) / len(counted)
    seconds = sum(line["seconds"] for line in steady)
    sampled = all("samples" in line for line in steady)
    return {
        "per_step": per_step,
        "per_second": sum(line["tokens"] for line in steady) / seconds if seconds else 0.0,
        "padding_share": 1 - per_step / places,
        **({"samples_per_second": sum(line["samples"] for line in steady) / seconds} if sampled and seconds else {}),
    }


def _typical(seconds: Sequence[float], first: int, sorts: Sequence[int]) -> float | None:
    """The mean of the median seconds of each sort of step; None if no step was taken.

    `seconds` are those of consecutive steps from step `first` on, counted from 0; `sorts`
    gives the sort of each step of a cycle.
    """
    import statistics  # imported here: it takes 2 MiB, which are needed only once the training process has ended

    steady = seconds[1:] or seconds
    by_sort: dict[int, list[float]] = {}
    for step, duration in enumerate(steady, first + len(seconds) - len(steady)):
        by_sort.setdefault(sorts[step % len(sorts)], []).append(duration)
    medians = {sort: statistics.median(group) for sort, group in by_sort.items()}
    return statistics.fmean(medians[sort] for sort in sorts if sort in medians) if medians else None


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``: the figures of every step so far, with those before the run was resumed."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _with_peak(phase: dict[str, Any], measured_peak: int | None) -> dict[str, Any]:
    """A phase with its measured peak: VmHWM at its end, which never falls and therefore includes earlier phases."""
    return phase and {**phase, "peak_bytes": {"predicted": phase["peak_bytes"], "measured": measured_peak}}
