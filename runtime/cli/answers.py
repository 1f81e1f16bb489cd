"""Formats the commands' results: as JSON for programs, and the same facts as text and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tightfit.planner.report.summary import adapter_words, plan_summary, profile_summary, update_words
from tightfit.profiles.devices.words import words_of
from tightfit.profiles.measuring.marks import caution, marks
from tightfit.runtime.common.units import MIB, format_seconds, format_size
from tightfit.runtime.supervision.report_text import facts_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tightfit.planner.report.explanation import Explanation
    from tightfit.planner.schema import Plan
    from tightfit.profiles.devices.data_sheets import DeviceDescription
    from tightfit.profiles.schema import Preference, Profile

UNNAMED_BASE = (
    "name this GGUF file as their base, since it does not say which model it was made of; PEFT's AutoPeftModel cannot"
    " open one: load that model yourself and give PeftModel.from_pretrained the adapter's folder"
)


def profile_text(profile: Profile) -> RenderableType:
    """The summary of a profile as a table."""
    facts, words = profile_summary(profile), words_of(profile.device)
    shape = f"batch {profile.batch}" + (f" × sequence {profile.seq}" if profile.seq else "")
    if facts["tile"] < profile.batch * (profile.seq or 1):
        shape += f" in tiles of {facts['tile']:,} tokens"
    origin = "measured" if facts["measured"] else "estimated from FLOPs and bytes"
    if facts["quota_cores"] is not None:
        origin += f" under a CPU quota of {facts['quota_cores']:g} cores"
    preference = profile.model.preference
    rows = [
        ("device", f"{facts['device']}, {profile.device.threads} threads, {origin}"),
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
        *([("loss", preference_words(preference))] if preference else []),
        *([("base", facts["base"])] if facts["base"] else []),
        *([("positions", facts["positions"])] if facts["positions"] else []),
        *([("adapter", adapter_words(facts["lora"]))] if "rank" in (facts["lora"] or {}) else []),
        (
            "trainables",
            (
                f"{format_size(facts['trainable_bytes'])}, with optimizer state"
                f" {format_size(facts['trainable_bytes'] + facts['state_bytes'])}"
            ),
        ),
        (
            "arithmetic",
            f"forward {format_seconds(facts['forward_seconds'])}, backward {format_seconds(facts['backward_seconds'])}",
        ),
        (
            words.elsewhere,
            (
                f"reads {facts['read_bytes_per_second'] / 1e6:,.0f} MB/s, writes"
                f" {facts['write_bytes_per_second'] / 1e6:,.0f} MB/s"
            ),
        ),
        ("floor", f"{format_size(facts['floor_bytes'])}: {words.floor} before any model is loaded"),
    ]
    if profile.model.kind == "decoder" and facts["adapter_base"].endswith(".gguf"):
        rows.append(("adapters", UNNAMED_BASE))
    if profile.model.compared:
        rows.append(("gradients", profile.model.compared))
    return facts_table([*(("caution", "; ".join(doubts)) for doubts in [marks(profile.device)] if doubts), *rows])


def preference_words(preference: Preference) -> str:
    """A loss of pairs in words."""
    return f"{preference.loss.upper()} on pairs of answers, two rows each, beta {preference.beta:g}"


def profile_sentence(profile: Profile) -> str:
    """A profile's model, step and figures in a sentence."""
    facts = profile_summary(profile)
    shape = f"{profile.batch} × {profile.seq} tokens" if profile.seq else f"a batch of {profile.batch}"
    adapter = f", {adapter_words(facts['lora'])}" if "rank" in (facts["lora"] or {}) else ""
    seconds = (
        f"forward {format_seconds(facts['forward_seconds'])}, backward {format_seconds(facts['backward_seconds'])}"
    )
    origin = "measured" if facts["measured"] else "estimated"
    if profile.model.preference:
        adapter += f", {preference_words(profile.model.preference)}"
    return (
        f"{facts['model']}, {shape} in {facts['compute_dtype']}{adapter}: {seconds}, {origin} on"
        f" {facts['device']} with {profile.device.threads} threads"
        + (f"; positions have {facts['positions']}" if facts["positions"] else "")
    )


def devices_text(devices: Sequence[DeviceDescription]) -> RenderableType:
    """A table of the known devices with their most important figures."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", no_wrap=True)
    for heading in ("GFLOP/s", "memory, GB/s", "offload, MB/s", "floor, MiB"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for device in devices:
        rates = device.flops_per_second
        table.add_row(
            Text(device.name),
            f"{rates.get('bfloat16', rates['float32']) / 1e9:,.0f}",
            f"{device.bytes_per_second / 1e9:,.0f}",
            f"{device.read.bytes_per_second / 1e6:,.0f}",
            f"{device.floor.start_peak_bytes / MIB:,.0f}",
            Text(device.label),
        )
    return table


def device_text(device: DeviceDescription) -> RenderableType:
    """A table with every figure of a device and its source."""
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
    """A plan in words, and a table of what fills the memory at its peak."""
    from rich.console import Group

    from tightfit.planner.report.explain import explain
    from tightfit.planner.report.render import bulleted, peak_table

    return Group(bulleted(explain(plan, explanation)), peak_table(plan, explanation))


def comparison_text(plans: Sequence[Plan]) -> RenderableType:
    """Step times by budget and policy, and a sentence for each budget; device after device."""
    from rich.console import Group
    from rich.text import Text

    from tightfit.planner.report.comparison_words import verdicts
    from tightfit.planner.report.memory_categories import devices_of
    from tightfit.planner.report.render import comparison_table

    updates = update_words(plans[0]) if plans else ""
    parts: list[RenderableType] = [Text(f"all plans with {updates}")] if updates else []
    for device in devices_of(plans):
        on_device = [plan for plan in plans if plan.device.name == device]
        parts += [*map(Text, caution(on_device[0].device)), comparison_table(on_device)]
        parts += [*map(Text, verdicts(on_device)), ""]
    return Group(*parts[:-1])


def changes(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """For the solver's plans on each device: what becomes of each tensor differently from one budget to the next."""
    from dataclasses import asdict
    from itertools import pairwise

    from tightfit.planner.report.diff import diff
    from tightfit.planner.report.memory_categories import devices_of

    changes = []
    for device in devices_of(plans):
        solver_plans = [p for p in plans if p.device.name == device and p.policy == "solver" and p.fits]
        for before, after in pairwise(sorted(solver_plans, key=lambda plan: plan.budget_bytes)):
            changes.append(
                {
                    "device": device,
                    "from_budget_bytes": before.budget_bytes,
                    "to_budget_bytes": after.budget_bytes,
                    "tensors": [asdict(change) for change in diff(before, after)],
                }
            )
    return changes


def facts(plan: Plan) -> dict[str, Any]:
    """A plan's summary as JSON, with the device that it is for."""
    return plan_summary(plan) | {"device": plan.device.name, "measured": plan.device.measured}
