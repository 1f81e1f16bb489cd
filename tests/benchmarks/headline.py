"""The published models under the published memory: ``make bench-headline`` (an hour or more for all five).

For every model: our plan and the fixed rules at the cap, ours from the cap to unlimited, each run under the cap that
the kernel enforces, beside transformers + peft in the same sitting where a baseline script is given. Weights are random
at full size: memory and time do not depend on their values. Prints a table, writes ``headline.json`` and
``headline.png``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import tables

from tightfit.planner.io import save_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import TightfitError

MIB = 1 << 20
Row = dict[str, Any]
"""a line of the table: what ran, and its figures"""
CAPS = {"qwen2.5-0.5b": 320, "qwen2.5-1.5b": 460, "qwen2.5-3b": 662, "gemma3-1b": 569, "gemma3-4b": 900}
"""MiB for all that a run keeps alive: what MeBP reports for a phone, without file-backed pages there (Gemma3-4B: 1029
MB).
"""
BASELINE_NAMES = dict(zip(CAPS, ("qwen0.5b", "qwen1.5b", "qwen3b", "gemma1b", "gemma4b"), strict=True))
RATIOS = (1.0, 1.25, 1.5, 2.0, 4.0)
RULES = ("mebp", "mesp", "keep-all", "mezo", "lcsb")
UNLIMITED = 64 << 30
USUAL = "transformers + peft"
FOUR_BIT = f"{USUAL} + NF4 + checkpointing"
PUBLISHED = {128: (253, 111), 256: (361, 136), 512: (582, 246), 1024: (1050, 514)}
"""Qwen2.5-0.5B by tokens: MB of MeBP and of MeSP, as MeSP's authors report them."""


def main(
    model: Annotated[list[str] | None, typer.Option(help="One of the five; may be repeated. All by default.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Script that prints a JSON line with step_s and peak_mib for MODEL CKPT SEQ.")
    ] = None,
    qlora: Annotated[
        Path | None, typer.Option(help="Script that prints a JSON line with step_s and peak_train_mib for MODEL SEQ.")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="A fixed rule; may be repeated. All of them by default.")
    ] = None,
    seq: Annotated[int, typer.Option(help="Tokens of the one sample.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of each run; the first two do not count.")] = 7,
    rounds: Annotated[int, typer.Option(help="Times that all of them run in turn; times are medians of these.")] = 1,
    time_limit: Annotated[float, typer.Option(help="Seconds for each plan.")] = 30.0,
    curve: Annotated[bool, typer.Option(help="Also plan and run above the cap.")] = True,
    lengths: Annotated[bool, typer.Option(help="Also Qwen2.5-0.5B at 128 to 1024 tokens in the least memory.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = ROOT / "examples" / "out" / "headline",
    write: Annotated[bool, typer.Option(help="Write the table to docs/benchmarks/headline.md.")] = False,
) -> None:
    """Measure every model and print one table."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in model or list(CAPS):
        try:
            least, plans = planned(name, seq, time_limit, curve=curve, rules=rule or RULES)
            ours = [partial(_row, name, plan, what, steps, out) for what, plan in plans]
            rows += [least, *in_turn([*ours, *baselines(name, seq, baseline, qlora)], rounds)]
            if lengths and name == "qwen2.5-0.5b":
                rows += [least_memory(name, length, steps, time_limit, out) for length in PUBLISHED]
        except TightfitError as error:
            rows.append({"model": name, "what": "failed", "note": f": {error}"})
        (out / "headline.json").write_text(json.dumps(rows, indent=1) + "\n")
    report = show(rows)
    draw(rows, out / "headline.png")
    if write:
        notes = (
            f"Published shapes with random 4-bit weights, LoRA rank 8 on all seven projections, 1 × {seq} tokens. Peaks"
            " are of all that a run keeps alive (training process and supervisor); the kernel enforces the caps, which are what"
            " MeBP (Song and Tang 2025) reports for a phone. The baselines are scripts of your own."
        )
        report.write("headline", "Published models in the memory of a phone", notes)


def planned(
    name: str, seq: int, time_limit: float, *, curve: bool, rules: Sequence[str]
) -> tuple[Row, list[tuple[str, Plan]]]:
    """The smallest budget for one model, and what to run: ours and the fixed rules."""
    planner = ModelPlanner(profile(str(ROOT / "examples" / "models" / name / "config.json"), batch=1, seq=seq))
    cap = CAPS[name] * MIB
    least = planner.minimum(time_limit=time_limit).peak_bytes
    plans = [
        (f"ours, {ratio:g} x cap", planner.plan(int(ratio * cap), time_limit=time_limit))
        for ratio in (RATIOS if curve else RATIOS[:1])
    ]
    plans.append(("ours, unlimited", planner.plan(UNLIMITED, time_limit=time_limit)))
    plans += [(rule, planner.plan(cap, policy=rule, time_limit=time_limit)) for rule in rules]
    return {"model": name, "what": "smallest feasible budget", "budget_bytes": least}, plans


def in_turn(takers: Sequence[Callable[[], Row]], rounds: int) -> list[Row]:
    """A row of each. A machine that others use is now faster, now slower: whoever runs once may have been lucky."""
    turns = [[taker() for taker in takers] for _ in range(rounds)]
    return [_over_rounds(rows) for rows in zip(*turns, strict=True)]


def _over_rounds(rows: Sequence[Row]) -> Row:
    """Medians of the seconds, the highest of the peaks."""
    row = rows[-1]
    if not all("step_seconds" in one for one in rows):
        return row
    seconds = [one["step_seconds"]["measured"] for one in rows]
    peak = max(one["peak_bytes"]["measured"] for one in rows)
    return row | {
        "peak_bytes": row["peak_bytes"] | {"measured": peak},
        "step_seconds": row["step_seconds"] | {"measured": statistics.median(seconds), "rounds": seconds},
    }


def least_memory(name: str, seq: int, steps: int, time_limit: float, out: Path) -> Row:
    """The smallest plan at another sequence length, run, beside what was published."""
    planner = ModelPlanner(profile(str(ROOT / "examples" / "models" / name / "config.json"), batch=1, seq=seq))
    mebp, mesp = PUBLISHED[seq]
    row = _row(name, planner.smallest_plan(time_limit=time_limit), f"smallest, {seq} tokens", steps, out)
    if "note" in row:
        return row
    above = row["above_floor_bytes"] / 1e6
    return row | {"note": f": {above:,.0f} MB above the floor; published: MeBP {mebp}, MeSP {mesp} MB"}


def baselines(name: str, seq: int, baseline: Path | None, qlora: Path | None) -> list[Callable[[], Row]]:
    """What people run today, each in a process of its own."""
    known = BASELINE_NAMES[name]
    takers: list[Callable[[], Row]] = []
    if baseline is not None:
        takers.append(partial(_baseline, name, USUAL, [str(baseline), known, "0", str(seq)]))
        takers.append(partial(_baseline, name, f"{USUAL} + checkpointing", [str(baseline), known, "1", str(seq)]))
    if qlora is not None:
        takers.append(partial(_baseline, name, FOUR_BIT, [str(qlora), known, str(seq)]))
    return takers


def _row(name: str, plan: Plan, what: str, steps: int, out: Path) -> Row:
    row = {"model": name, "what": what, "budget_bytes": plan.budget_bytes, "status": plan.status, "gap": plan.gap}
    if not plan.fits:
        return row | {"minimum_budget_bytes": plan.minimum_budget_bytes}
    # As a person runs it: the command's own process counts against the cap too.
    command = interpreter.command(
        "tightfit.runtime.cli.main", "run", str(save_plan(plan, out / "plan.json")), "--data", "random"
    )
    command += ["--steps", str(steps), "--output", str(out / "run"), "--overwrite", "--checkpoint-every", "0"]
    environment = os.environ | {"PYTHONPATH": interpreter.python_path()}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, env=environment)
    report = json.loads(done.stdout)
    if done.returncode:
        return row | {"note": f": {report['error']['message']}"}
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    seconds = statistics.median(json.loads(line)["seconds"] for line in lines[2:])
    return row | {
        "peak_bytes": report["peak_bytes"],
        "step_seconds": {"predicted": plan.step_seconds, "measured": seconds},
        "enforced_by": report["enforced_by"],
        "above_floor_bytes": report["peak_bytes"]["measured"] - plan.floor_bytes,
    }


def _baseline(name: str, what: str, command: list[str]) -> Row:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"model": name, "what": what, "note": ": " + (done.stderr.strip().splitlines() or ["failed"])[-1]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "model": name,
        "what": what,
        "peak_bytes": {"measured": found.get("peak_mib", found.get("peak_train_mib")) * MIB},
        "step_seconds": {"measured": found["step_s"]},
    }


def show(rows: list[Row]) -> tables.Report:
    from rich import box
    from rich.table import Table

    def reference(what: str) -> dict[str, float]:
        """Seconds of a baseline by model."""
        return {r["model"]: r["step_seconds"]["measured"] for r in rows if r["what"] == what and "step_seconds" in r}

    references = [reference(USUAL), reference(FOUR_BIT)]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("")
    headings = (
        "cap, MiB",
        "predicted",
        "measured",
        "above floor",
        "step, s: predicted",
        "measured",
        "to baseline",
        "to NF4",
        "gap",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        peak, step = row.get("peak_bytes", {}), row.get("step_seconds", {})
        needed = row.get("minimum_budget_bytes")
        # Rows of other lengths, and least memory, are compared with what is published.
        known = [None if "note" in row else seconds.get(row["model"]) for seconds in references]
        table.add_row(
            row["model"],
            row["what"] + (f" (needs {_mib(needed)} MiB)" if needed else "") + row.get("note", ""),
            _mib(row.get("budget_bytes")),
            _mib(peak.get("predicted")),
            _mib(peak.get("measured")),
            _mib(row.get("above_floor_bytes")),
            _number(step.get("predicted"), ".2f"),
            _number(step.get("measured"), ".2f"),
            *(_number(step["measured"] / one if step and one else None, ".2f") for one in known),
            _number(row.get("gap") if step else None, ".2%"),
        )
    report = tables.Report()
    report.table(table)
    return report


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.0f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw(rows: list[Row], path: Path) -> None:
    """Measured seconds against measured memory, one panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.6), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        timed = [row for row in rows if row["model"] == name and "step_seconds" in row and "note" not in row]
        points = sorted(_point(row) for row in timed if row["what"].startswith("ours"))
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label="tightfit")
        for row in timed:
            if not row["what"].startswith("ours"):
                axis.plot(*_point(row), "s", label=row["what"])
        axis.set(title=name, xlabel="peak of the process, MiB", ylabel="seconds per step", xscale="log")
        axis.set_ylim(0, 1.1 * max(_point(row)[1] for row in timed) if timed else 1.0)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    shown = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown), fontsize="small")
    figure.savefig(path, dpi=120)


def _point(row: Row) -> tuple[float, float]:
    return row["peak_bytes"]["measured"] / MIB, row["step_seconds"]["measured"]


if __name__ == "__main__":
    typer.run(main)
