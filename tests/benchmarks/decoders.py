"""Smallest budgets and steps of published decoders at full size, on an estimated device: how much memory each needs to
be trained at all, what a step takes there and with twice as much, how near the proven bound it is, and how long
planning takes.

Nothing is downloaded and nothing is measured: the shapes are those of `published.py`, the weights would be random, and
the times are estimated for a device that tightfit describes. Seconds of planning are CPU seconds of this process, which
plans one model after the other.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]

import tables
from published import MODELS, Published

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.sources.lookup import resolve
from tightfit.runtime.common.errors import InputError, TightfitError
from tightfit.runtime.common.units import MIB

FREQUENCIES = "inv_freq"
"""End of the names of rotary frequencies, which are stored with the weights and are no parameters."""


def main(
    models: Annotated[str, typer.Option(help="names out of published.py, separated by commas; all by default")] = "",
    seq: Annotated[int, typer.Option(help="tokens of the one sample")] = 256,
    tile: Annotated[
        int | None, typer.Option(help="tokens of it that go through a layer at a time; default: all")
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank, on all linear layers")] = 8,
    device: Annotated[str, typer.Option(help="as `tightfit devices` lists them")] = "zen5-2core",
    seconds: Annotated[float, typer.Option(help="time limit of a plan")] = 120.0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file for the figures; those of other models that it has stay in it"),
    ] = None,
    *,
    write: Annotated[bool, typer.Option(help="write docs/benchmarks/decoders.md")] = False,
) -> None:
    """Plan every model at its smallest budget and at twice that."""
    chosen = [name.strip() for name in models.split(",") if name.strip()] or list(MODELS)
    if unknown := [name for name in chosen if name not in MODELS]:
        raise typer.BadParameter(f"no model is called {', '.join(unknown)}; there are {', '.join(MODELS)}")
    kept = json.loads(output.read_text()) if output is not None and output.exists() else []
    found: dict[str, dict[str, Any]] = {row["model"]: row for row in kept}
    for name in chosen:
        try:
            found[name] = planned(name, MODELS[name], seq=seq, tile=tile, rank=rank, device=device, seconds=seconds)
        except TightfitError as error:
            found[name] = {"model": name, "failed": str(error)}
            print(f"{name}: {error}", flush=True)
        if output is not None:
            output.write_text(json.dumps(list(found.values()), indent=1) + "\n")
    rows = [found[name] for name in MODELS if name in found]
    report = tables.Report(width=190)
    report.table(table_of(rows))
    for row in rows:
        if "failed" in row:
            report.text(f"{row['model']}: {row['failed']}")
    if write:
        report.write("decoders", "Published decoders at full size", notes(seq, rank, device, seconds))


def notes(seq: int, rank: int, device: str, seconds: float) -> str:
    return (
        "Published shapes (`tests/benchmarks/published.py` says where they are from) with 4-bit weights, LoRA of rank"
        f" {rank} on all linear layers, 1 × {seq} tokens in bfloat16; seconds per step are estimated for `{device}` ([how"
        ' well](../devices.md)). "Parameters" are those of the text decoder. "By": whether tightfit has the decoder\'s code or'
        " transformers, from which it was traced. Budgets are of the whole run; the smallest is the least for which the planner"
        ' found a plan. "Gap": by how much a plan of its class could be faster at most, proven; a plan had'
        f' {seconds:g} s. "Planned in": CPU seconds of one core, without tracing.'
    )


def planned(
    name: str, model: Published, *, seq: int, tile: int | None, rank: int, device: str, seconds: float
) -> dict[str, Any]:
    """Figures of a model. Raises TightfitError where it cannot be profiled or planned, or is not what was published."""
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(model.config))
        entries = resolve(str(path)).entries.values()
        made = profile(str(path), batch=1, seq=seq, tile=tile, lora_rank=rank, device=device)
    parameters = sum(math.prod(entry.shape) for entry in entries if not entry.name.endswith(FREQUENCIES))
    if model.exact not in (None, parameters):
        raise InputError(
            f"{parameters:,} parameters where {model.exact:,} were published; check its config in published.py"
        )
    row: dict[str, Any] = {
        "model": name,
        "by": "tightfit" if handwritten(model.config) else "transformers",
        "parameters": parameters,
        "packed_bytes": sum(entry.bytes for entry in entries),
        "traced_seconds": time.process_time() - begun,
    }
    print(f"{name}: {parameters / 1e9:.3f} B parameters, traced in {row['traced_seconds']:.0f} s", flush=True)
    begun = time.process_time()
    planner = ModelPlanner(made)
    least = planner.minimum_bytes(time_limit=seconds)
    row["found_seconds"] = time.process_time() - begun
    print(f"{name}: smallest budget {least / MIB:,.0f} MiB, found in {row['found_seconds']:.0f} s", flush=True)
    for what, budget in (("smallest", least), ("twice", 2 * least)):
        begun = time.process_time()
        row[what] = figures(planner.plan(budget, time_limit=seconds), time.process_time() - begun)
        print(f"{name}: {said(row[what])}", flush=True)
    return row


def figures(plan: Plan, seconds: float) -> dict[str, Any]:
    return {
        "budget_bytes": plan.budget_bytes,
        "step_seconds": plan.step_seconds,
        "gap": plan.gap,
        "status": plan.status,
        "deterministic": plan.deterministic,
        "planned_seconds": seconds,
    }


def said(made: dict[str, Any]) -> str:
    return (
        f"{made['budget_bytes'] / MIB:,.0f} MiB, step {made['step_seconds']:.2f} s, gap {made['gap']:.2%},"
        f" planned in {made['planned_seconds']:.0f} s"
    )


def table_of(rows: list[dict[str, Any]]) -> Table:
    headings = (
        *("model", "by", "parameters", "packed, MiB"),
        *("smallest budget, MiB", "found in, s", "step, s", "gap", "planned in, s"),
        *("at twice: step, s", "gap", "planned in, s"),
    )
    table = Table(*headings)
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], *["–"] * (len(headings) - 1))
            continue
        least, twice = row["smallest"], row["twice"]
        table.add_row(
            row["model"],
            row["by"],
            f"{row['parameters'] / 1e9:.2f} B",
            f"{row['packed_bytes'] / MIB:,.0f}",
            f"{least['budget_bytes'] / MIB:,.0f}",
            f"{row['found_seconds']:.0f}",
            *cells(least),
            *cells(twice),
        )
    return table


def cells(made: dict[str, Any]) -> tuple[str, str, str]:
    gap = "optimal" if made["status"] == "optimal" else f"{made['gap']:.2%}"
    return f"{made['step_seconds']:.2f}", gap, f"{made['planned_seconds']:.0f}"


if __name__ == "__main__":
    typer.run(main)
