"""How long planning takes and how near the bound it comes: decoders of published shapes, against every fixed rule.

Prints tables and, with --output, writes the figures as JSON. CPU seconds: the planner uses one thread, and other processes
do not count.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from shapes import decoder_profile

from planner.plan import Planner
from planner.policies import POLICIES
from profiles.units import MIB, format_size

SHARES = (0.02, 0.1, 0.25, 0.5, 1.0)
"""budgets, from the smallest to keep-all"""
CURVE = tuple(i / 11 for i in range(12))


def main(
    layers: Annotated[list[int] | None, typer.Option(help="depths to plan at five budgets each")] = None,
    depth: Annotated[list[int] | None, typer.Option(help="depths for the growth of the cost")] = None,
    time_limit: Annotated[float, typer.Option(help="seconds per plan")] = 60.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the figures")] = None,
    *,
    curve: Annotated[bool, typer.Option(help="a curve of 12 budgets beside a single one")] = True,
) -> None:
    """Plan, measure, compare."""
    console = Console(width=130)
    figures: dict[str, Any] = {"budgets": [], "depth": [], "curve": []}
    for count in layers or [36, 80]:
        figures["budgets"] += at_budgets(count, time_limit, console)
    if curve:
        figures["curve"] = on_a_curve((layers or [36])[0], time_limit, console)
    figures["depth"] = by_depth(depth if depth is not None else [24, 48, 96, 192], time_limit, console)
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    console.print(f"peak of the planning process: {format_size(figures['peak_bytes'])}")
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


def ends(planner: Planner) -> tuple[int, int]:
    """(near the smallest budget, the peak of keep-all)"""
    return planner.minimum_bytes(), planner.plan(1 << 45, policy="keep-all").peak_bytes


def at_budgets(layers: int, time_limit: float, console: Console) -> list[dict[str, Any]]:
    """Five budgets, each by a planner that knows nothing yet, beside the fixed rules at the same budget."""
    profile = decoder_profile(layers)
    smallest, largest = ends(Planner(profile))
    table = Table("budget", "CPU s", "step s", "gap", "status", *POLICIES, title=f"{layers} layers, each budget alone")
    rows = []
    for share in SHARES:
        budget = int(smallest + share * (largest - smallest))
        begun = time.process_time()
        planner = Planner(profile)
        made = planner.plan(budget, time_limit=time_limit)
        seconds = time.process_time() - begun
        rules = {name: planner.plan(budget, policy=name) for name in POLICIES}
        slower = {n: p.step_seconds / made.step_seconds if p.train is not None else None for n, p in rules.items()}
        if any(ratio is not None and ratio < 1 - 1e-9 for ratio in slower.values()):
            console.print(f"[red]{layers} layers at {format_size(budget)}: slower than a fixed rule: {slower}")
        rows.append(
            {
                "layers": layers,
                "budget_bytes": budget,
                "cpu_seconds": seconds,
                "step_seconds": made.step_seconds,
                "gap": made.gap,
                "status": made.status,
                "deterministic": made.deterministic,
                "times_slower": slower,
            }
        )
        told = ["does not fit" if ratio is None else f"{ratio:.2f} ×" for ratio in slower.values()]
        table.add_row(
            f"{budget / MIB:.0f} MiB",
            f"{seconds:.1f}",
            f"{made.step_seconds:.3f}",
            f"{made.gap:.2%}",
            made.status,
            *told,
        )
    console.print(table)
    return rows


def on_a_curve(layers: int, time_limit: float, console: Console) -> list[dict[str, Any]]:
    """Twelve budgets by one planner, which reuses what it has found."""
    profile = decoder_profile(layers)
    smallest, largest = ends(Planner(profile))
    planner = Planner(profile)
    table = Table("budget", "CPU s", "step s", "gap", title=f"{layers} layers, one curve")
    rows = []
    for share in reversed(CURVE):
        budget = int(1.02 * smallest + share * (largest - 1.02 * smallest))
        begun = time.process_time()
        made = planner.plan(budget, time_limit=time_limit)
        seconds = time.process_time() - begun
        rows.append(
            {"budget_bytes": budget, "cpu_seconds": seconds, "step_seconds": made.step_seconds, "gap": made.gap}
        )
        table.add_row(f"{budget / MIB:.0f} MiB", f"{seconds:.1f}", f"{made.step_seconds:.3f}", f"{made.gap:.2%}")
    table.add_row("together", f"{sum(row['cpu_seconds'] for row in rows):.1f}")
    console.print(table)
    return rows


def by_depth(depths: list[int], time_limit: float, console: Console) -> list[dict[str, Any]]:
    """Equal layers, more and more of them, at 1.5 times the smallest rule's peak."""
    table = Table("layers", "CPU s", "programs priced", "columns", "gap", title="equal layers")
    rows = []
    for count in depths:
        planner = Planner(decoder_profile(count))
        budget = int(planner.plan(1 << 45, policy="mebp").peak_bytes * 1.5)
        begun = time.process_time()
        made = planner.plan(budget, time_limit=time_limit)
        seconds = time.process_time() - begun
        pool = planner.solver.pool
        columns = sum(map(len, pool.columns))
        rows.append(
            {"layers": count, "cpu_seconds": seconds, "programs": pool.programs, "columns": columns, "gap": made.gap}
        )
        table.add_row(str(count), f"{seconds:.1f}", str(pool.programs), str(columns), f"{made.gap:.2%}")
    console.print(table)
    return rows


if __name__ == "__main__":
    typer.run(main)
