"""Modules beside eager PyTorch: ResNet-50, ViT-S/16, a U-Net, an LSTM, a GPT and networks of timm, at all, half and a
quarter of the memory that eager PyTorch takes (``make bench-modules``).

`eager.py` trains each network in a process of its own, whose peak gives the budgets. Then that process and the plans
run by turns, and the losses of the plans' steps are compared with those of eager PyTorch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER)]

import eager
import tables

import tightfit
from tightfit.planner.schema import Plan
from tightfit.runtime.common.units import MIB

SHARES = {"all": 1.0, "half": 0.5, "a quarter": 0.25}
FIRST = 1
"""steps of each turn whose seconds do not count: they fault memory in, and the first allocates the optimizer's
states
"""


def main(
    networks: Annotated[
        str, typer.Option(help=f"which of {', '.join(eager.NETWORKS)}, separated by commas")
    ] = "resnet50,vit,unet,lstm,gpt,swin_tiny_patch4_window7_224,mobilenetv3_large_100,efficientnet_b0,densenet121,convnext_pico",
    steps: Annotated[int, typer.Option(help="steps of each turn")] = 4,
    rounds: Annotated[int, typer.Option(help="how often each of them runs, by turns")] = 2,
    time_limit: Annotated[float, typer.Option(help="seconds for each plan")] = 10.0,
    threads: Annotated[int | None, typer.Option(help="of all of them; default: one for each core")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for the figures as JSON")] = None,
    *,
    write: Annotated[bool, typer.Option(help="write docs/benchmarks/modules.md")] = False,
) -> None:
    """Measure every network and print one table."""
    report = tables.Report(width=190)
    table = Table(
        *("network", "budget", "MiB", "peak: predicted, MiB", "measured"),
        *("step: predicted, s", "measured", "to eager", "losses apart"),
    )
    figures = {}
    for name in networks.split(","):
        figures[name] = found = measured(name, steps, rounds, time_limit, threads)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            (output / "modules.json").write_text(json.dumps(figures, indent=1))
        network, usual = eager.NETWORKS[name], found["eager"]
        table.add_row(
            f"{network.title}, {network.size}", "eager PyTorch", "", "", f"{usual['peak'] / MIB:,.0f}", "",
            f"{usual['step']:.2f}", "1", "",
        )  # fmt: skip
        for own in found["plans"]:
            table.add_row(
                *("", own["share"], f"{own['budget'] / MIB:,.0f}"),
                *(f"{own['predicted_peak'] / MIB:,.1f}", f"{own['peak'] / MIB:,.1f}"),
                *(f"{own['predicted_step']:.2f}", f"{own['step']:.2f}", f"{own['step'] / usual['step']:.2f}"),
                f"{own['apart']:.0e}",
            )
    report.table(table)
    if write:
        report.write(
            "modules",
            "Modules of one's own beside eager PyTorch",
            "Plain PyTorch modules in float32 with AdamW, all parameters trained, on random batches. The budgets are the peak"
            " (`VmHWM`) of eager PyTorch with its fused AdamW, half and a quarter of it, or the smallest budget. They count the"
            " supervisor (16 MiB), which is the benchmark itself here: measured peaks are without it. Seconds are medians over"
            f" {rounds} turns of {steps} steps, without the first of each. Losses apart: the largest difference of a step's loss"
            " from eager PyTorch's, relative to it.",
        )


def measured(name: str, steps: int, rounds: int, time_limit: float, threads: int | None) -> dict[str, Any]:
    """Figures of a network under eager PyTorch and of its plans."""
    network = eager.NETWORKS[name]
    count = sum(parameter.numel() for parameter in network.make().parameters())
    if network.parameters not in (None, count):
        raise SystemExit(
            f"{network.title} has {count:,} parameters, and not the {network.parameters:,} that were published"
        )
    begin = time.perf_counter()
    profile = tightfit.profile(f"eager:{name}", threads=threads)
    say(name, f"profiled in {time.perf_counter() - begin:.0f} s; {profile.model.compared}")
    threads = profile.device.threads
    turns = [eager_turn(name, steps, threads)]
    say(name, f"eager: {turns[0]['peak'] / MIB:,.0f} MiB, {statistics.median(turns[0]['seconds'][FIRST:]):.2f} s")
    planner = tightfit.planner_of(profile)
    plans: dict[str, Plan] = {}
    for called, part in SHARES.items():
        begin, share = time.perf_counter(), called
        plan = planner.plan(int(part * turns[0]["peak"]), time_limit=time_limit)
        if plan.minimum_budget_bytes is not None:
            share, plan = "the smallest", planner.plan(plan.minimum_budget_bytes, time_limit=time_limit)
        plans[share] = plan
        say(
            name, f"{share}: {plan.peak_bytes / MIB:,.0f} MiB, {plan.step_seconds:.2f} s, gap {100 * plan.gap:.1f} %,"
            f" planned in {time.perf_counter() - begin:.0f} s",
        )  # fmt: skip
    given = eager.batches(name, steps)
    taken: dict[str, list[dict[str, Any]]] = {share: [] for share in plans}
    for turn in range(rounds):
        if turn:
            turns.append(eager_turn(name, steps, threads))
        for share, plan in plans.items():
            taken[share].append(planned_turn(plan, given))
            say(name, f"{share}: {statistics.median(taken[share][-1]['seconds'][FIRST:]):.2f} s")
    usual = {"peak": max(turn["peak"] for turn in turns), "step": typical(turns), "turns": turns}
    return {
        "eager": usual,
        "plans": [
            {
                "share": share,
                "budget": plan.budget_bytes,
                "predicted_peak": plan.peak_bytes,
                "predicted_step": plan.step_seconds,
                "peak": max(turn["peak"] for turn in taken[share]),
                "step": typical(taken[share]),
                "apart": max(
                    abs(own - theirs) / abs(theirs)
                    for turn in taken[share]
                    for own, theirs in zip(turn["losses"], turns[0]["losses"], strict=True)
                ),
                "turns": taken[share],
            }
            for share, plan in plans.items()
        ],
    }


def eager_turn(name: str, steps: int, threads: int) -> dict[str, Any]:
    """What `eager.train` returns, of a fresh process."""
    words = [sys.executable, str(FOLDER / "eager.py"), name, str(steps), str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def planned_turn(plan: Plan, batches: list[eager.Batch]) -> dict[str, Any]:
    """The same of a run of a plan."""
    with tempfile.TemporaryDirectory() as out:
        done = tightfit.run(plan, batches, steps=len(batches), out=out, lr=eager.LR, checkpoint_every=1_000_000)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines],
        "seconds": [line["seconds"] for line in lines],
        "peak": done["peak_bytes"]["measured"],
        "report": {part: done[part] for part in ("step_seconds", "phases") if part in done},
    }


def typical(turns: list[dict[str, Any]]) -> float:
    """Seconds of a step: the median over all turns, without the first steps of each."""
    return statistics.median(seconds for turn in turns for seconds in turn["seconds"][FIRST:])


def say(name: str, text: str) -> None:
    print(f"{name}: {text}", flush=True)


if __name__ == "__main__":
    typer.run(main)
