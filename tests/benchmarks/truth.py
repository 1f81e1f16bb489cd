"""Predicted beside measured: ``make bench-truth`` plans decoders and foreign modules at four budgets, as `tightfit plan` does, and runs
each plan again and again in its exact budget (two hours for all; ``ARGS='--models convnext_pico --runs 3'`` for one in minutes).

The budgets are the smallest one, 1.3 and 2 times that, and all memory. A plan is rehearsed before it counts. Each run is a process of
its own under a cap of exactly the predicted peak: one byte more held ends it.
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
    ended, made = 0, 0
    for name in models.split(",") if models else (*DECODERS, *eager.TIMM):
        network = name in eager.TIMM
        source = f"eager:{name}" if network else str(MODELS / name / "config.json") if name in DECODERS else name
        profile = tightfit.profile(source, **({} if network else {"seq": seq}))
        for row, early, count in measured(Path(name).name, profile, runs, steps, time_limit):
            rows.append(row)
            ended, made = ended + early, made + count
        told(rows, f"{ended} of {made} runs were ended by their own cap.", runs, steps, write=write)


def told(rows: list[list[str]], early: str, runs: int, steps: int, *, write: bool) -> None:
    """Print what there is so far, and write it as the page."""
    table = Table(
        *("model", "budget", "MiB", "peak: predicted", "held, at most", "ratio"),
        *("step: predicted, s", "measured", "ratio", "unrehearsed", "ended early"),
    )
    for row in rows:
        table.add_row(*row)
    report = tables.Report(width=170)
    report.table(table)
    report.text(early)
    if write:
        report.write(
            "truth",
            "Predicted beside measured",
            "Decoders with a LoRA adapter of rank 8, 1 × 256 tokens, bfloat16; networks of timm in float32, 8 images each, all"
            " parameters trained; AdamW. Weights are random. Each plan is made and rehearsed as `tightfit plan` does, then run"
            f" {runs} times for {steps} steps in a cap of exactly its predicted peak. Peaks are the kernel's VmHWM of all processes;"
            " seconds are the median over all runs, the first step of each left out. Unrehearsed: the ratio of the seconds that the"
            " first rehearsal took to those that the profile alone had predicted.",
        )


def measured(name: str, profile: Profile, runs: int, steps: int, time_limit: float) -> list[tuple[list[str], int, int]]:
    """For each budget the row of the table, the number of runs that were ended early, and of all."""
    say(name, "profiled")
    rows: list[tuple[list[str], int, int]] = []
    least = 0
    for share, factor in SHARES.items():
        budget = UNLIMITED if factor is None else int(factor * least)

        def make(step: Profile, budget: int = budget) -> Plan:
            planner = tightfit.planner_of(step)
            return (
                planner.plan(budget, time_limit=time_limit) if budget else planner.smallest_plan(time_limit=time_limit)
            )

        begin = time.perf_counter()
        found = rehearsed(profile, lambda step: step, make, tell=lambda words: say(name, words))
        plan = found.plan
        least = least or plan.peak_bytes
        say(name, f"{share}: planned and rehearsed in {time.perf_counter() - begin:.0f} s")
        exact = rebudgeted(plan, budget_bytes=plan.peak_bytes)
        peaks, seconds, early = carried_out(exact, runs, steps)
        step = statistics.median(seconds) if seconds else float("nan")
        first = found.first
        rows.append(
            (
                [
                    *(name if factor == 1.0 else "", share, f"{plan.peak_bytes / MIB:,.0f}"),
                    *(
                        f"{plan.peak_bytes / MIB:,.1f}",
                        f"{max(peaks) / MIB:,.1f}",
                        f"{max(peaks) / plan.peak_bytes:.3f}",
                    ),
                    *(f"{plan.step_seconds:.3f}", f"{step:.3f}", f"{step / plan.step_seconds:.2f}"),
                    "" if first is None else f"{first.seconds / first.predicted_seconds:.2f}",
                    f"{early} of {runs}",
                ],
                early,
                runs,
            )
        )
        say(name, " ".join(rows[-1][0]))
    return rows


def carried_out(plan: Plan, runs: int, steps: int) -> tuple[list[int], list[float], int]:
    """Peaks of all processes, seconds of all steps but the first ones, and how many runs the cap ended."""
    peaks, seconds, early = [plan.device.floor.supervisor_bytes], [], 0
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
            seconds += [json.loads(line)["seconds"] for line in lines[FIRST:]]
    return peaks, seconds, early


def say(name: str, text: str) -> None:
    print(f"  {name}: {text}", flush=True)


if __name__ == "__main__":
    typer.run(main)
