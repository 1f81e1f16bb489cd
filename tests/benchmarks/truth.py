"""Expected beside measured: ``make bench-truth`` plans decoders and foreign modules at four budgets, as `tightfit plan`
does, and runs each plan again and again in its exact budget (two hours for all; ``ARGS='--models convnext_pico --runs
3'`` for one in minutes).

The budgets are the smallest one, 1.3 and 2 times that, and all memory. A plan is rehearsed before it counts: its
expected seconds are its rehearsal's. Each run is a process of its own under a cap of exactly the predicted peak: one
byte more held ends it. By how much runs of one plan differ among each other is the machine's own spread.
"""

from __future__ import annotations

import json
import statistics
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
from tightfit.planner.plan_result import rebudgeted
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import CapError, TightfitError
from tightfit.runtime.common.units import MIB
from tightfit.runtime.session.rehearsal import rehearsed

MODELS = FOLDER.parents[1] / "examples" / "models"
DECODERS = ("qwen2.5-0.5b", "gemma3-1b", "qwen2.5-1.5b")
UNLIMITED = 1 << 40
SHARES = {"the smallest": 1.0, "1.3 x": 1.3, "2 x": 2.0, "all": None}
FIRST = 1
"""steps of each run whose seconds do not count"""


def main(
    models: Annotated[
        str,
        typer.Option(help="Names of decoders and networks, or files of models, separated by commas; default: all."),
    ] = "",
    runs: Annotated[int, typer.Option(help="Runs of each plan.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 4,
    time_limit: Annotated[float, typer.Option(help="Seconds for each plan.")] = 20.0,
    seq: Annotated[int, typer.Option(help="Tokens of a decoder's sample.")] = 256,
    *,
    write: Annotated[bool, typer.Option(help="Write docs/benchmarks/truth.md.")] = False,
) -> None:
    """Plan, rehearse and run every model, and print one table."""
    rows: list[list[str]] = []
    spreads: list[float] = []
    ended, made = 0, 0
    for name in models.split(",") if models else (*DECODERS, *eager.TIMM):
        network = name in eager.TIMM
        source = f"eager:{name}" if network else str(MODELS / name / "config.json") if name in DECODERS else name
        profile = tightfit.profile(source, **({} if network else {"seq": seq}))
        for row, early, spread in measured(Path(name).name, profile, runs, steps, time_limit):
            rows.append(row)
            spreads.append(spread)
            ended, made = ended + early, made + runs
        told(
            rows,
            f"{ended} of {made} runs were ended by their own cap. The medians of a plan's runs lie {statistics.median(spreads):.0%} from"
            f" each other in the median, {max(spreads):.0%} at most.",
            runs,
            steps,
            write=write,
        )


def told(rows: list[list[str]], ending: str, runs: int, steps: int, *, write: bool) -> None:
    """Print what there is so far, and write it as the page."""
    table = Table(
        *("model", "budget", "MiB", "peak: predicted", "held, at most", "ratio"),
        *("step: expected, s", "measured", "ratio", "spread", "by the model, s", "busy cores", "ended early"),
    )
    for row in rows:
        table.add_row(*row)
    report = tables.Report(width=170)
    report.table(table)
    report.text(ending)
    if write:
        report.write(
            "truth",
            "Expected beside measured",
            "Decoders with a LoRA adapter of rank 8, 1 × 256 tokens, bfloat16; networks of timm in float32, 8 images each, all"
            " parameters trained; AdamW. Weights are random. Each plan is made and rehearsed as `tightfit plan` does, then run"
            f" {runs} times for {steps} steps in a cap of exactly its predicted peak. Peaks are the kernel's VmHWM of all processes;"
            " seconds are the median over all runs, the first step of each left out. Expected is what a step of the plan's last rehearsal"
            " took, the ratio that of the runs to it. Spread: the distance of the fastest run's median from the slowest's, as a share of"
            " what is measured. By the model: the seconds by which plans were compared. Busy cores: that other programs took"
            " during the rehearsal.",
        )


def measured(
    name: str, profile: Profile, runs: int, steps: int, time_limit: float
) -> list[tuple[list[str], int, float]]:
    """For each budget the row of the table, the number of runs that were ended early, and the spread of the others."""
    say(name, "profiled")
    rows: list[tuple[list[str], int, float]] = []
    least = 0
    for share, factor in SHARES.items():
        budget = UNLIMITED if factor is None else int(factor * least)

        def make(step: Profile, budget: int = budget) -> Plan:
            planner = tightfit.planner_of(step)
            return (
                planner.plan(budget, time_limit=time_limit) if budget else planner.smallest_plan(time_limit=time_limit)
            )

        begin = time.perf_counter()
        plan, _ = rehearsed(profile, lambda step: step, make, tell=lambda words: say(name, words), wait=True)
        least = least or plan.peak_bytes
        say(name, f"{share}: planned and rehearsed in {time.perf_counter() - begin:.0f} s")
        exact = rebudgeted(plan, budget_bytes=plan.peak_bytes)
        peaks, seconds, early = carried_out(exact, runs, steps)
        step = statistics.median(one for run in seconds for one in run) if seconds else float("nan")
        medians = [statistics.median(run) for run in seconds]
        spread = (max(medians) - min(medians)) / step if medians else 0.0
        rows.append(
            (
                [
                    *(name if factor == 1.0 else "", share, f"{plan.peak_bytes / MIB:,.0f}"),
                    *(
                        f"{plan.peak_bytes / MIB:,.1f}",
                        f"{max(peaks) / MIB:,.1f}",
                        f"{max(peaks) / plan.peak_bytes:.3f}",
                    ),
                    *(
                        f"{plan.expected_seconds:.3f}",
                        f"{step:.3f}",
                        f"{step / plan.expected_seconds:.2f}",
                        f"{spread:.0%}",
                    ),
                    *(f"{plan.step_seconds:.3f}", f"{plan.busy_cores:.1f}", f"{early} of {runs}"),
                ],
                early,
                spread,
            )
        )
        say(name, " ".join(rows[-1][0]))
    return rows


def carried_out(plan: Plan, runs: int, steps: int) -> tuple[list[int], list[list[float]], int]:
    """Peaks of all processes, of each run the seconds of all steps but the first ones, and how many runs the cap
    ended.
    """
    peaks, early = [plan.device.floor.supervisor_bytes], 0
    seconds: list[list[float]] = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            try:
                told: dict[str, Any] = tightfit.run(plan, "random", steps=steps, out=Path(folder) / "run")
            except CapError as error:
                print(f"  ended by its cap: {error}", flush=True)
                early += 1
                continue
            except TightfitError as error:
                raise SystemExit(str(error)) from error
            peaks.append(told["processes"]["training"]["measured"] + plan.device.floor.supervisor_bytes)
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            seconds.append([json.loads(line)["seconds"] for line in lines[FIRST:]])
    return peaks, seconds, early


def say(name: str, text: str) -> None:
    print(f"  {name}: {text}", flush=True)


if __name__ == "__main__":
    typer.run(main)
