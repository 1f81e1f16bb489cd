"""Formats the report of a run as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.units import format_size, padding_text

if TYPE_CHECKING:
    from rich.console import RenderableType


def report_text(report: dict[str, Any]) -> RenderableType:
    """Tables with predicted and measured figures, and where the adapter (of a module: the model) was saved."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "predicted", "measured", "measured / predicted"):
        table.add_column(heading, justify="left" if not heading else "right")
    peak, step = report["peak_bytes"], report["step_seconds"]
    processes = report.get("processes", {})  # reports of older versions have none
    several = len(processes) > 1
    figures = [("peak of its processes" if several else "peak of the process", peak)]
    figures += [(f"– {name}", one) for name, one in processes.items() if several]
    for name, one in figures:
        ratio = f"{one['measured'] / one['predicted']:.4f}"
        table.add_row(name, format_size(one["predicted"]), format_size(one["measured"]), ratio)
    taken = step["measured"]  # None where the metrics of a resumed run are lost
    ratio = f"{taken / step['predicted']:.3f}" if taken and step["predicted"] else "–"
    table.add_row("step", f"{step['predicted']:.3f} s", f"{taken:.3f} s" if taken else "–", ratio)
    if tokens := report.get("tokens"):
        rate = f"{tokens['per_second']:,.0f}"
        table.add_row(f"tokens/s ({padding_text(tokens['padding_share'])})", "–", rate, "–")
        if tokens.get("samples_per_second"):
            table.add_row("samples/s", "–", f"{tokens['samples_per_second']:,.2f}", "–")
    cap = "the kernel (memory cgroup)" if report["enforced_by"] == "cgroup" else "the process's own meter"
    counted = report.get("cgroup_peak_bytes")
    rows = [
        (
            "cap",
            f"{format_size(report['budget_bytes'])}, enforced by {cap}"
            + (f", which counted {format_size(counted)} with page cache and its own tables" if counted else ""),
        ),
        *(
            [("prepared in", f"{format_size(report['preparation_bytes'])}: plan and data, before training began")]
            if report.get("preparation_bytes")
            else []
        ),
        (
            "loss",
            f"{report['loss'][0]:.4f} → {report['loss'][-1]:.4f} in {len(report['loss'])} steps"
            if report["loss"]
            else "–",
        ),
    ]
    if refused := (report.get("packing") or {}).get("refused"):
        rows.append(("rows", f"one sample each: {refused}"))
    if report["adapter"]:
        rows.append((Path(report["adapter"]).name, str(report["adapter"])))
    if result := report.get("fleet", {}).get("result"):
        rows.append(("result", result))
    for when, found in report.get("evaluation", {}).items():
        accuracy = (
            f", accuracy {found['accuracy']:.3f} on {found['questions']} questions"
            if found.get("accuracy") is not None
            else ""
        )
        rows.append((f"evaluated {when}", f"loss {found['loss']:.4f}{accuracy}"))
    profiled = report.get("profiled_step")
    return Group(table, facts_table(rows), *([_profiled_table(profiled)] if profiled else []))


def _profiled_table(profiled: dict[str, Any]) -> RenderableType:
    from rich import box
    from rich.table import Table

    title = f"where the {profiled['seconds']:.3f} s of step {profiled['step']} went"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in ("", "seconds", "share"):
        table.add_column(heading, justify="left" if not heading else "right")
    for part, seconds in profiled["parts"].items():
        table.add_row(part, f"{seconds:.3f}", f"{seconds / profiled['seconds']:.1%}")
    return table


def facts_table(rows: Sequence[tuple[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in rows:
        table.add_row(Text(name, style="bold"), Text(fact))
    return table
