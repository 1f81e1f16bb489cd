"""The published models under the published memory: ``make bench-headline`` (an hour or more for all five).

For every model: our plan and the fixed rules at the cap, ours from the cap to unlimited, each run under the cap that the
kernel enforces, beside transformers + peft in the same sitting where a baseline script is given. Weights are random at
full size: memory and time do not depend on their values. Prints a table, writes ``headline.json`` and ``headline.png``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from planner.plan import Planner
from planner.schema import Plan
from profiles.api import profile
from profiles.errors import TightfitError
from runtime.launch import run

MIB = 1 << 20
CAPS = {"qwen2.5-0.5b": 320, "qwen2.5-1.5b": 460, "qwen2.5-3b": 662, "gemma3-1b": 569, "gemma3-4b": 900}
"""MiB for the whole process: what MeBP reports for a phone, without file-backed pages there (Gemma3-4B: 1029 MB)."""
BASELINE_NAMES = dict(zip(CAPS, ("qwen0.5b", "qwen1.5b", "qwen3b", "gemma1b", "gemma4b"), strict=True))
RATIOS = (1.0, 1.25, 1.5, 2.0, 4.0)
RULES = ("mebp", "mesp", "keep-all", "mezo", "lcsb")
UNLIMITED = 64 << 30
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
    seq: Annotated[int, typer.Option(help="Tokens of the one sample.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of each run; the first two do not count.")] = 7,
    time_limit: Annotated[float, typer.Option(help="Seconds for each plan.")] = 30.0,
    curve: Annotated[bool, typer.Option(help="Also plan and run above the cap.")] = True,
    lengths: Annotated[bool, typer.Option(help="Also Qwen2.5-0.5B at 128 to 1024 tokens in the least memory.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = ROOT / "examples" / "out" / "headline",
) -> None:
    """Measure every model and print one table."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in model or list(CAPS):
        try:
            rows += measure(name, seq, steps, time_limit, out, curve=curve)
            rows += baselines(name, seq, baseline, qlora)
            if lengths and name == "qwen2.5-0.5b":
                rows += [least_memory(name, length, steps, time_limit, out) for length in PUBLISHED]
        except TightfitError as error:
            rows.append({"model": name, "what": "failed", "note": f": {error}"})
        (out / "headline.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)
    draw(rows, out / "headline.png")


def measure(name: str, seq: int, steps: int, time_limit: float, out: Path, *, curve: bool) -> list[dict[str, Any]]:
    """Ours and the fixed rules for one model."""
    planner = Planner(profile(str(ROOT / "examples" / "models" / name / "config.json"), batch=1, seq=seq))
    cap = CAPS[name] * MIB
    least = planner.minimum(time_limit=time_limit).peak_bytes
    rows: list[dict[str, Any]] = [{"model": name, "what": "smallest feasible budget", "budget_bytes": least}]
    for ratio in RATIOS if curve else RATIOS[:1]:
        plan = planner.plan(int(ratio * cap), time_limit=time_limit)
        rows.append(_row(name, plan, f"ours, {ratio:g} x cap", steps, out))
    rows.append(_row(name, planner.plan(UNLIMITED, time_limit=time_limit), "ours, unlimited", steps, out))
    for rule in RULES:
        rows.append(_row(name, planner.plan(cap, policy=rule, time_limit=time_limit), rule, steps, out))
    return rows


def least_memory(name: str, seq: int, steps: int, time_limit: float, out: Path) -> dict[str, Any]:
    """The smallest plan at another sequence length, run, beside what was published."""
    planner = Planner(profile(str(ROOT / "examples" / "models" / name / "config.json"), batch=1, seq=seq))
    mebp, mesp = PUBLISHED[seq]
    row = _row(name, planner.smallest_plan(time_limit=time_limit), f"smallest, {seq} tokens", steps, out)
    if "note" in row:
        return row
    above = row["above_floor_bytes"] / 1e6
    return row | {"note": f": {above:,.0f} MB above the floor; published: MeBP {mebp}, MeSP {mesp} MB"}


def baselines(name: str, seq: int, baseline: Path | None, qlora: Path | None) -> list[dict[str, Any]]:
    """What people run today, each in a process of its own."""
    usual = "transformers + peft"
    known = BASELINE_NAMES[name]
    rows = []
    if baseline is not None:
        rows.append(_baseline(name, usual, [str(baseline), known, "0", str(seq)]))
        rows.append(_baseline(name, f"{usual} + checkpointing", [str(baseline), known, "1", str(seq)]))
    if qlora is not None:
        rows.append(_baseline(name, f"{usual} + NF4 + checkpointing", [str(qlora), known, str(seq)]))
    return rows


def _row(name: str, plan: Plan, what: str, steps: int, out: Path) -> dict[str, Any]:
    row = {"model": name, "what": what, "budget_bytes": plan.budget_bytes, "status": plan.status, "gap": plan.gap}
    if plan.status == "infeasible":
        return row | {"minimum_budget_bytes": plan.minimum_budget_bytes}
    try:
        report = run(
            plan, "random", steps=steps, out=out / "run", overwrite=True, checkpoint_every=0, profile_step=True
        )
    except TightfitError as error:
        return row | {"note": f": {error}"}
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    seconds = statistics.median(json.loads(line)["seconds"] for line in lines[2:])
    return row | {
        "peak_bytes": report["peak_bytes"],
        "step_seconds": {"predicted": plan.step_seconds, "measured": seconds},
        "enforced_by": report["enforced_by"],
        "above_floor_bytes": report["peak_bytes"]["measured"] - plan.floor_bytes,
        "profiled_step": report["profiled_step"]["parts"],
    }


def _baseline(name: str, what: str, command: list[str]) -> dict[str, Any]:
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


def show(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    reference = {
        row["model"]: row["step_seconds"]["measured"]
        for row in rows
        if row["what"] == "transformers + peft" and "step_seconds" in row
    }
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("")
    for heading in ("cap, MiB", "predicted", "measured", "step, s: predicted", "measured", "to baseline", "gap"):
        table.add_column(heading, justify="right")
    for row in rows:
        peak, step = row.get("peak_bytes", {}), row.get("step_seconds", {})
        known, needed = reference.get(row["model"]), row.get("minimum_budget_bytes")
        table.add_row(
            row["model"],
            row["what"] + (f" (needs {_mib(needed)} MiB)" if needed else "") + row.get("note", ""),
            _mib(row.get("budget_bytes")),
            _mib(peak.get("predicted")),
            _mib(peak.get("measured")),
            _number(step.get("predicted"), ".2f"),
            _number(step.get("measured"), ".2f"),
            _number(step["measured"] / known if step and known else None, ".2f"),
            _number(row.get("gap") if step else None, ".2%"),
        )
    Console(width=150).print(table)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.0f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured seconds against measured memory, one panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        timed = [row for row in rows if row["model"] == name and "step_seconds" in row and "note" not in row]
        points = sorted(_point(row) for row in timed if row["what"].startswith("ours"))
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label="tightfit")
        for row in timed:
            if not row["what"].startswith("ours"):
                axis.plot(*_point(row), "s", label=row["what"])
        axis.set(title=name, xlabel="peak of the process, MiB", ylabel="seconds per step", xscale="log")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def _point(row: dict[str, Any]) -> tuple[float, float]:
    return row["peak_bytes"]["measured"] / MIB, row["step_seconds"]["measured"]


if __name__ == "__main__":
    typer.run(main)
