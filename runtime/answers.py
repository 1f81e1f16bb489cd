"""What the commands answer: the same facts as JSON for programs and as text and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.summary import plan_summary, profile_summary, to_json
from profiles.marks import caution, marks
from profiles.units import MIB, format_seconds, format_size, padding_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planner.explanation import Explanation
    from planner.schema import Plan
    from profiles.devices import DeviceDescription
    from profiles.schema import Profile

__all__ = [
    "comparison_text",
    "device_text",
    "devices_text",
    "infeasible_text",
    "plan_summary",
    "plan_text",
    "profile_summary",
    "profile_text",
    "report_text",
    "to_json",
]
FLOORS = {"cpu": "Python and PyTorch", "cuda": "the CUDA context"}


def profile_text(profile: Profile) -> RenderableType:
    """The summary as a table."""
    facts = profile_summary(profile)
    shape = f"batch {profile.batch}" + (f" × sequence {profile.seq}" if profile.seq else "")
    how = "measured" if facts["measured"] else "estimated from FLOPs and bytes"
    rows = [
        ("device", f"{facts['device']}, {profile.device.threads} threads, {how}"),
        ("model", f"{facts['model']}, {facts['layers']} layers of {facts['programs']} kinds"),
        (
            "step",
            f"{shape}, {facts['compute_dtype']}"
            + (f"; {profile.accumulate} make an update" if profile.accumulate > 1 else ""),
        ),
        (
            "frozen weights",
            f"{format_size(facts['packed_bytes'])} packed, {format_size(facts['weight_bytes'])} unpacked",
        ),
        (
            "trainables",
            f"{format_size(facts['trainable_bytes'])}, with optimizer state {format_size(facts['trainable_bytes'] + facts['state_bytes'])}",
        ),
        (
            "arithmetic",
            f"forward {format_seconds(facts['forward_seconds'])}, backward {format_seconds(facts['backward_seconds'])}",
        ),
        (
            "disk" if profile.device.kind == "cpu" else "host memory",
            f"reads {facts['read_bytes_per_second'] / 1e6:,.0f} MB/s, writes {facts['write_bytes_per_second'] / 1e6:,.0f} MB/s",
        ),
        ("floor", f"{format_size(facts['floor_bytes'])}: {FLOORS[profile.device.kind]} before any model is loaded"),
    ]
    if profile.model.compared:
        rows.append(("gradients", profile.model.compared))
    return _facts_table([*(("caution", "; ".join(said)) for said in [marks(profile.device)] if said), *rows])


def devices_text(devices: Sequence[DeviceDescription]) -> RenderableType:
    """Known devices with the figures that decide most."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", no_wrap=True)
    for heading in ("GFLOP/s", "memory, GB/s", "offload, MB/s", "floor, MiB"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in devices:
        rates = one.flops_per_second
        table.add_row(
            Text(one.name),
            f"{rates.get('bfloat16', rates['float32']) / 1e9:,.0f}",
            f"{one.bytes_per_second / 1e9:,.0f}",
            f"{one.read.bytes_per_second / 1e6:,.0f}",
            f"{one.floor.start_peak_bytes / MIB:,.0f}",
            Text(one.label),
        )
    return table


def device_text(device: DeviceDescription) -> RenderableType:
    """Every figure of a device with its source."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    floor = device.floor
    figures = {
        "memory_bytes": format_size(device.memory_bytes),
        "flops_per_second": ", ".join(
            f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in device.flops_per_second.items()
        ),
        "bytes_per_second": f"{device.bytes_per_second / 1e9:,.1f} GB/s",
        "call_seconds": f"{device.call_seconds * 1e6:,.0f} µs",
        "floor": f"{format_size(floor.held_bytes)}, at the start {format_size(floor.start_peak_bytes)}",
    }
    for name in ("read", "write"):
        channel = getattr(device, name)
        figures[name] = f"{channel.bytes_per_second / 1e6:,.0f} MB/s, latency {channel.latency_seconds * 1e6:,.0f} µs"
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=Text(f"{device.name}: {device.label}"), title_justify="left"
    )
    for heading in ("figure", "value", "source"):
        table.add_column(heading)
    for name, value in figures.items():
        table.add_row(name, Text(value), Text(device.sources[name]))
    return table


def plan_text(plan: Plan, explanation: Explanation) -> RenderableType:
    """The plan in words, and what fills the memory at its peak."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from planner.explain import explain
    from planner.render import peak_table

    sentences = Table.grid(padding=(0, 1))
    for sentence in explain(plan, explanation):
        sentences.add_row("•", Text(sentence))
    return Group(sentences, peak_table(plan))


def infeasible_text(plan: Plan, explanation: Explanation) -> str:
    """Why no plan fits, and the smallest budget that is enough; rounded up, so that it can be typed back."""
    from planner.explain import explain

    return "; ".join(explain(plan, explanation))


def comparison_text(plans: Sequence[Plan]) -> RenderableType:
    """Step times by budget and policy, and a sentence for each budget; device after device."""
    from rich.console import Group
    from rich.text import Text

    from planner.html import verdicts
    from planner.kinds import devices_of
    from planner.render import comparison_table

    parts: list[RenderableType] = []
    for device in devices_of(plans):
        here = [plan for plan in plans if plan.device.name == device]
        parts += [*map(Text, caution(here[0].device)), comparison_table(here), *map(Text, verdicts(here)), ""]
    return Group(*parts[:-1])


def changes(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """What changes, tensor by tensor, from each budget to the next for the solver's plans on each device."""
    from dataclasses import asdict
    from itertools import pairwise

    from planner.diff import diff
    from planner.kinds import devices_of, feasible

    told = []
    for device in devices_of(plans):
        mine = [p for p in plans if p.device.name == device and p.policy == "solver" and feasible(p)]
        for before, after in pairwise(sorted(mine, key=lambda plan: plan.budget_bytes)):
            told.append(
                {
                    "device": device,
                    "from_budget_bytes": before.budget_bytes,
                    "to_budget_bytes": after.budget_bytes,
                    "tensors": [asdict(change) for change in diff(before, after)],
                }
            )
    return told


def report_text(report: dict[str, Any]) -> RenderableType:
    """Predicted beside measured, and where the adapter, or a module's model, lies."""
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
        (Path(report["adapter"]).name, str(report["adapter"])),
    ]
    for when, found in report.get("evaluation", {}).items():
        accuracy = (
            f", accuracy {found['accuracy']:.3f} on {found['questions']} questions"
            if found.get("accuracy") is not None
            else ""
        )
        rows.append((f"evaluated {when}", f"loss {found['loss']:.4f}{accuracy}"))
    profiled = report.get("profiled_step")
    return Group(table, _facts_table(rows), *([_profiled_table(profiled)] if profiled else []))


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


def _facts_table(rows: Sequence[tuple[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in rows:
        table.add_row(Text(name, style="bold"), Text(fact))
    return table
