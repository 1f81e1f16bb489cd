"""What decoders that are written by hand are worth: the same models traced from transformers instead, planned at the same
budgets and run by turns (a few minutes for each model).

Weights are random at full size: memory and time do not depend on their values. The families in
`tightfit.profiles.models.families` are built by hand; here `handwritten` is made to deny that for one profile of two.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from unittest import mock

import typer
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent)]

import tables

import tightfit
from tightfit.runtime.common.units import MIB

ROADS = ("by hand", "traced")
UNLIMITED = 64 << 30


@contextmanager
def road(name: str) -> Iterator[None]:
    """Within this context models are built by the road `name`."""
    if name == ROADS[0]:
        yield
        return
    denied = [f"tightfit.profiles.{room}.handwritten" for room in ("api", "sources.lookup")]
    with mock.patch(denied[0], return_value=False), mock.patch(denied[1], return_value=False):
        yield


def main(
    models: Annotated[str, typer.Option(help="folders of examples/models, separated by commas")] = "qwen2.5-0.5b",
    memory: Annotated[str, typer.Option(help="a budget for each of them, separated by commas")] = "320MiB",
    seq: Annotated[int, typer.Option(help="tokens of the one sample")] = 256,
    steps: Annotated[int, typer.Option(help="steps of each run")] = 5,
    rounds: Annotated[int, typer.Option(help="how often each is run, by turns")] = 3,
    *,
    write: Annotated[bool, typer.Option(help="write docs/benchmarks/traced.md")] = False,
) -> None:
    """Measure, plan and run both."""
    report = tables.Report(width=170)
    headings = (
        *("model", "built", "smallest budget, MiB", "step at any memory, s", "budget, MiB"),
        *("peak: predicted, MiB", "measured", "step: predicted, s", "measured", "to that by hand"),
    )
    table = Table(*headings)
    for name, budget in zip(models.split(","), map(tightfit.parse_size, memory.split(",")), strict=True):
        for cells in rows(name, budget, seq, steps, rounds):
            table.add_row(*cells)
    report.table(table)
    if write:
        report.write(
            "traced",
            "Decoders written by hand beside the same ones traced from transformers",
            f"Published shapes with random 4-bit weights, LoRA of rank 8 on all linear layers, 1 × {seq} tokens in bfloat16."
            f" Both are measured, planned and run in one sitting, {rounds} runs each by turns; measured seconds are medians of"
            " these runs' steps.",
        )


def rows(name: str, budget: int, seq: int, steps: int, rounds: int) -> Iterator[tuple[str, ...]]:
    """A row of the table for each road."""
    path = str(ROOT / "examples" / "models" / name / "config.json")
    least, unlimited, plans = {}, {}, {}
    for one in ROADS:
        with road(one):
            planner = tightfit.planner_of(tightfit.profile(path, batch=1, seq=seq, force=True))
        least[one] = planner.minimum(time_limit=60).peak_bytes
        unlimited[one] = planner.plan(UNLIMITED, time_limit=30).step_seconds
        plans[one] = planner.plan(budget, time_limit=30)
        print(f"{name} {one}: smallest {least[one] / MIB:.0f} MiB, step {plans[one].step_seconds:.3f} s", flush=True)
    seconds: dict[str, list[float]] = {one: [] for one in ROADS}
    peaks = dict.fromkeys(ROADS, 0)
    for _ in range(rounds):
        for one in ROADS:
            with tempfile.TemporaryDirectory() as out, road(one):
                done = tightfit.run(plans[one], "random", steps=steps, out=out)
            seconds[one].append(done["step_seconds"]["measured"])
            peaks[one] = max(peaks[one], done["peak_bytes"]["measured"])
            print(f"{name} {one}: {seconds[one][-1]:.3f} s", flush=True)
    for one in ROADS:
        step = statistics.median(seconds[one])
        yield (
            *(name, one, f"{least[one] / MIB:,.0f}", f"{unlimited[one]:.2f}", f"{budget / MIB:,.0f}"),
            *(f"{plans[one].peak_bytes / MIB:,.1f}", f"{peaks[one] / MIB:,.1f}"),
            *(f"{plans[one].step_seconds:.2f}", f"{step:.2f}", f"{step / statistics.median(seconds[ROADS[0]]):.3f}"),
        )


if __name__ == "__main__":
    typer.run(main)
