"""What the commands answer: the same facts as JSON for programs and as text and tables for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from profiles.units import MIB, format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planner.explanation import Explanation
    from planner.schema import Phase, Plan
    from profiles.devices import DeviceDescription
    from profiles.schema import Profile

PLAN_FIELDS = (
    "status",
    "policy",
    "budget_bytes",
    "floor_bytes",
    "peak_bytes",
    "step_seconds",
    "bound_seconds",
    "gap",
    "any_schedule_bound_seconds",
    "any_schedule_gap",
    "solve_seconds",
    "minimum_budget_bytes",
    "minimum_budget_reason",
    "arena_bytes",
    "workspace_bytes",
    "fingerprint",
    "profile_fingerprint",
)
PHASE_FIELDS = (
    "seconds",
    "peak_bytes",
    "compute_seconds",
    "recompute_seconds",
    "unpack_seconds",
    "stall_seconds",
    "read_bytes",
    "write_bytes",
)


FLOORS = {"cpu": "Python and PyTorch", "cuda": "the CUDA context"}


def to_json(value: Any) -> str:
    """One line of strict JSON; what is no number (an infeasible plan's step time) becomes null."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def profile_summary(profile: Profile) -> dict[str, Any]:
    """The profile in figures: bytes by kind of tensor, seconds of compute, floor and disk."""
    programs = {program.name: program for program in profile.programs}
    seconds = {"forward": 0.0, "backward": 0.0}
    for layer in profile.layers:
        for operator in programs[layer.program].operators:
            seconds[operator.phase] += operator.seconds
    return {
        "fingerprint": profile.fingerprint,
        "model": profile.model.name,
        "batch": profile.batch,
        "seq": profile.seq,
        "compute_dtype": profile.compute_dtype,
        "layers": len(profile.layers),
        "programs": len(profile.programs),
        "weight_bytes": _total(profile, "weight"),
        "packed_bytes": sum(tensor.packed_bytes for tensor in profile.tensors),
        "trainable_bytes": _total(profile, "trainable"),
        "forward_seconds": seconds["forward"],
        "backward_seconds": seconds["backward"],
        "floor_bytes": max(profile.device.floor.import_peak_bytes, profile.device.floor.resident_bytes),
        "read_bytes_per_second": profile.device.read.bytes_per_second,
        "write_bytes_per_second": profile.device.write.bytes_per_second,
        "device": profile.device.name,
        "measured": profile.device.measured,
    }


def _total(profile: Profile, kind: str) -> int:
    return sum(tensor.bytes for tensor in profile.tensors if tensor.kind == kind)


def profile_text(profile: Profile) -> RenderableType:
    """The summary as a table."""
    facts = profile_summary(profile)
    shape = f"batch {profile.batch}" + (f" × sequence {profile.seq}" if profile.seq else "")
    how = "measured" if facts["measured"] else "estimated from FLOPs and bytes"
    rows = [
        ("device", f"{facts['device']}, {profile.device.threads} threads, {how}"),
        ("model", f"{facts['model']}, {facts['layers']} layers of {facts['programs']} kinds"),
        ("step", f"{shape}, {facts['compute_dtype']}"),
        (
            "frozen weights",
            f"{format_size(facts['packed_bytes'])} packed, {format_size(facts['weight_bytes'])} unpacked",
        ),
        (
            "trainables",
            f"{format_size(facts['trainable_bytes'])}, with optimizer state {format_size(facts['trainable_bytes'] * 3)}",
        ),
        ("arithmetic", f"forward {facts['forward_seconds']:.3f} s, backward {facts['backward_seconds']:.3f} s"),
        (
            "disk" if profile.device.kind == "cpu" else "host memory",
            f"reads {facts['read_bytes_per_second'] / 1e6:,.0f} MB/s, writes {facts['write_bytes_per_second'] / 1e6:,.0f} MB/s",
        ),
        ("floor", f"{format_size(facts['floor_bytes'])}: {FLOORS[profile.device.kind]} before any model is loaded"),
    ]
    return _facts_table(rows)


def devices_text(devices: Sequence[DeviceDescription]) -> RenderableType:
    """Known devices with the figures that decide most."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", no_wrap=True)
    for heading in ("GFLOP/s", "memory, GB/s", "offload, MB/s", "floor, MiB"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in devices:
        rates = one.flops_per_second
        table.add_row(
            one.name,
            f"{rates.get('bfloat16', rates['float32']) / 1e9:,.0f}",
            f"{one.bytes_per_second / 1e9:,.0f}",
            f"{one.read.bytes_per_second / 1e6:,.0f}",
            f"{one.floor.import_peak_bytes / MIB:,.0f}",
            one.label,
        )
    return table


def device_text(device: DeviceDescription) -> RenderableType:
    """Every figure of a device with its source."""
    from rich import box
    from rich.table import Table

    floor = device.floor
    figures = {
        "memory_bytes": format_size(device.memory_bytes),
        "flops_per_second": ", ".join(
            f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in device.flops_per_second.items()
        ),
        "bytes_per_second": f"{device.bytes_per_second / 1e9:,.1f} GB/s",
        "call_seconds": f"{device.call_seconds * 1e6:,.0f} µs",
        "floor": f"{format_size(floor.resident_bytes)}, at the start {format_size(floor.import_peak_bytes)}",
    }
    for name in ("read", "write"):
        channel = getattr(device, name)
        figures[name] = f"{channel.bytes_per_second / 1e6:,.0f} MB/s, latency {channel.latency_seconds * 1e6:,.0f} µs"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{device.name}: {device.label}", title_justify="left")
    for heading in ("figure", "value", "source"):
        table.add_column(heading)
    for name, value in figures.items():
        table.add_row(name, value, device.sources[name])
    return table


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The plan without its schedule: decisions counted, phases in figures."""
    from planner.render import decision_counts

    summary: dict[str, Any] = {name: getattr(plan, name) for name in PLAN_FIELDS}
    summary["decisions"] = decision_counts(plan)
    summary["train"], summary["evaluate"] = _phase(plan.train), _phase(plan.evaluate)
    return summary


def _phase(phase: Phase | None) -> dict[str, Any] | None:
    if phase is None:
        return None
    figures: dict[str, Any] = {name: getattr(phase, name) for name in PHASE_FIELDS}
    return figures | {
        "instructions": len(phase.instructions),
        "peak": {"text": phase.peak.text, "tensors": phase.peak.tensors},
    }


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

    from planner.html import verdicts
    from planner.kinds import devices_of
    from planner.render import comparison_table

    parts: list[RenderableType] = []
    for device in devices_of(plans):
        here = [plan for plan in plans if plan.device.name == device]
        parts += [comparison_table(here), *verdicts(here), ""]
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
    """Predicted beside measured, and where the adapter lies."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "predicted", "measured", "measured / predicted"):
        table.add_column(heading, justify="left" if not heading else "right")
    peak, step = report["peak_bytes"], report["step_seconds"]
    table.add_row(
        "peak of the process",
        format_size(peak["predicted"]),
        format_size(peak["measured"]),
        f"{peak['measured'] / peak['predicted']:.4f}",
    )
    table.add_row(
        "step", f"{step['predicted']:.3f} s", f"{step['measured']:.3f} s", f"{step['measured'] / step['predicted']:.3f}"
    )
    cap = "the kernel (memory cgroup)" if report["enforced_by"] == "cgroup" else "the process's own meter"
    rows = [
        ("cap", f"{format_size(report['budget_bytes'])}, enforced by {cap}"),
        (
            "loss",
            f"{report['loss'][0]:.4f} → {report['loss'][-1]:.4f} in {len(report['loss'])} steps"
            if report["loss"]
            else "–",
        ),
        ("adapter", str(report["adapter"])),
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

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in rows:
        table.add_row(f"[bold]{name}", fact)
    return table
