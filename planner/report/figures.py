"""Pictures for papers and READMEs, drawn with matplotlib: step time against budget, and memory over a step.

Files are PNG or SVG by their suffix. Times in seconds, memory in MiB; small budgets in KiB or bytes.
"""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.planner.report.chart_data import curve_of
from tightfit.planner.report.memory_categories import (
    MemoryBand,
    TimelineSlice,
    budgets_of,
    devices_of,
    in_use,
    kinds_of,
    policies_of,
    timeline_slices,
)
from tightfit.planner.schema import Plan
from tightfit.profiles.devices.words import words_of
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import write_whole
from tightfit.runtime.common.units import MIB, format_size, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5fbf", "#b04a12", "#12806a", "#7a4bb8", "#b03a6f", "#6b7280")
INK, SOFT, LINE, WARN = "#1d2126", "#59616b", "#dfe2e6", "#b3261e"
SLICES = 600


def picture_kind(path: Path) -> str:
    """png or svg, by the file's suffix. Raises InputError for another."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise InputError(f"{path}: pictures are written as .png or .svg; name such a file")
    return kind


def draw_curve(plans: Sequence[Plan], path: str | os.PathLike[str]) -> Path:
    """Draw seconds per step against the budget, a line per policy, and the solver's proven bound; one picture per
    device, one under the other. Returns the file.
    """
    names = devices_of(plans)
    figure, rows = _canvas(9.0, 4.0, rows=len(names))
    for name, axes in zip(names, rows, strict=True):
        _draw_device(axes, [plan for plan in plans if plan.device.name == name], titled=len(names) > 1)
    return _save(figure, path)


def _draw_device(axes: Axes, plans: Sequence[Plan], *, titled: bool) -> None:
    unit = unit_of(budgets_of(plans)[-1])
    for curve in curve_of(plans, policies_of(plans)):
        colour, points = COLOURS[curve["slot"] % len(COLOURS)], curve["points"]
        budgets = [point["budget"] / unit.size for point in points]
        steps = [point["step"] for point in points]
        axes.plot(budgets, steps, "-o", color=colour, markersize=5, label=curve["name"])
        if curve["name"] == "solver" and points:
            bounds = [point["bound"] for point in points]
            axes.plot(budgets, bounds, ":", color=SOFT, label="proven bound of the solver's class")
        misfits = [misfit["budget"] / unit.size for misfit in curve["misfits"]]
        # Just above the axis, each policy in a row of its own.
        height = 0.025 + 0.04 * curve["slot"]
        axes.plot(misfits, [height] * len(misfits), "x", color=colour, transform=axes.get_xaxis_transform())
    if not all(plan.fits for plan in plans):
        axes.plot([], [], "x", color=SOFT, label="does not fit")
    axes.set_ylim(bottom=0)
    axes.set_xticks([budget / unit.size for budget in budgets_of(plans)])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"budget for {words_of(plans[0].device, plans[0].model).budget}, {unit.name}")
    axes.set_ylabel("seconds per step by the model" + ("" if plans[0].device.measured else ", estimated"))
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if titled:
        axes.set_title(plans[0].device.name, loc="left", fontsize=11, color=INK)


def draw_timeline(
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    measured: Sequence[tuple[int, int]] = (),
    measured_peak: int | None = None,
) -> Path:
    """Draw one step's predicted memory, stacked by kind, under the cap. Returns the file.

    `measured` are (instruction, resident bytes of the process) samples, drawn where the plan has the instruction;
    `measured_peak` is the kernel's high-water mark of the run in bytes. Raises InputError where the plan has no
    timeline to draw.
    """
    slices = timeline_slices(plan.timeline, SLICES)
    if not slices:
        raise InputError(f"a plan that is {plan.status} at {format_size(plan.budget_bytes)} has no timeline to draw")
    figure, (axes,) = _canvas(11.0, 4.8)
    kinds = kinds_of((slice_.point for slice_ in slices), plan.device.kind)
    peak = max(slices, key=lambda slice_: in_use(slice_.point))
    top = max(*(slice_.point.bytes for slice_ in slices), plan.peak_bytes, measured_peak or 0) / MIB
    capped = plan.budget_bytes / MIB <= 1.7 * top
    top = max(top, plan.budget_bytes / MIB if capped else 0.0) * 1.06
    _stack(axes, slices, kinds, top)
    if capped:
        axes.axhline(plan.budget_bytes / MIB, color=WARN, linestyle="--", linewidth=1.4)
        axes.annotate(
            f"cap {format_size(plan.budget_bytes)}",
            (0.004, plan.budget_bytes / MIB),
            xycoords=("axes fraction", "data"),
            xytext=(2, 4),
            textcoords="offset points",
            color=WARN,
            fontsize=9,
            fontweight="bold",
        )
    axes.plot(
        [(peak.start + peak.end) / 2],
        [in_use(peak.point) / MIB],
        "o",
        color="white",
        markeredgecolor=INK,
        markersize=6,
        zorder=5,
        label="fullest instruction of the step",
    )
    axes.axhline(
        plan.peak_bytes / MIB,
        color=SOFT,
        linewidth=1.2,
        label=f"predicted peak of the run, {format_size(plan.peak_bytes)}",
    )
    if measured:
        times = [_predicted_seconds(plan, instruction) for instruction, _ in measured]
        axes.plot(times, [size / MIB for _, size in measured], color=INK, linewidth=1.3, label="measured resident set")
    if measured_peak is not None:
        axes.axhline(
            measured_peak / MIB,
            color=INK,
            linestyle=":",
            linewidth=1.2,
            label=f"measured peak of the run (VmHWM), {format_size(measured_peak)}",
        )
    start = _axis_start(kinds, slices, top)
    axes.set_ylim(start, top)
    axes.set_xlim(0, slices[-1].end)
    axes.set_xlabel("seconds into the step, as predicted")
    axes.set_ylabel("MiB, whole process" + (f" (axis starts at {start:.0f})" if start else ""))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_title(
        f"{plan.model.name}: {plan.policy} at {format_size(plan.budget_bytes)}", loc="left", fontsize=11, color=INK
    )
    return _save(figure, path)


def _axis_start(kinds: Sequence[MemoryBand], slices: Sequence[TimelineSlice], top: float) -> float:
    """Where the axis begins, in MiB: zero, or just inside the floor where the floor would fill half of the picture."""
    floor = min(slice_.point.by_kind.get("floor", 0) for slice_ in slices) / MIB
    if floor < 0.4 * top or not kinds or kinds[0].name != "floor":
        return 0.0
    return max(0.0, floor - 0.12 * (top - floor)) // 10 * 10


def _predicted_seconds(plan: Plan, instruction: int) -> float:
    """When the plan has `instruction` done; linear between the points of its timeline."""
    instructions = [point.instruction for point in plan.timeline]
    after = min(bisect.bisect_left(instructions, instruction), len(instructions) - 1)
    right = plan.timeline[after]
    if after == 0 or right.instruction <= instruction:
        return right.seconds
    left = plan.timeline[after - 1]
    share = (instruction - left.instruction) / (right.instruction - left.instruction)
    return left.seconds + share * (right.seconds - left.seconds)


def _stack(axes: Axes, slices: Sequence[TimelineSlice], kinds: Sequence[MemoryBand], top: float) -> None:
    edges = [slice_.start for slice_ in slices] + [slices[-1].end]
    rows = [[slice_.point.by_kind.get(kind.name, 0) / MIB for slice_ in slices] for kind in kinds]
    # A band too thin to be seen needs no line in the legend: matplotlib leaves labels with an underscore out.
    labels = [kind.label if max(row) > 0.002 * top else "_" for kind, row in zip(kinds, rows, strict=True)]
    # A value holds from its slice's start to its end: the last value is drawn twice.
    values = [[*row, row[-1]] for row in rows]
    axes.stackplot(edges, *values, step="post", colors=[kind.light for kind in kinds], labels=labels, linewidth=0)


def _canvas(width: float, height: float, *, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` pictures of width x height inches each, one under the other."""
    # The object interface: no pyplot, no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    all_axes: list[Axes] = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for axes in all_axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(LINE)
        axes.tick_params(colors=SOFT, labelsize=9)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.label.set_color(SOFT)
        axes.yaxis.label.set_color(SOFT)
    return figure, all_axes


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    kind = picture_kind(path)
    options: dict[str, Any] = {"dpi": 150} if kind == "png" else {"metadata": {"Date": None}}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, **options)
    return write_whole(path, drawn.getvalue())
