"""A split federated plan in sentences and a table, for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tightfit.planner.fleet.split_schema import SplitBaseline, SplitPlan
from tightfit.planner.report.explain import percent_within
from tightfit.planner.report.render import bulleted, captioned
from tightfit.runtime.common.units import format_seconds, format_size, printable, unit_of

SLACK = 1e-5
"""of a round: the order is found in whole numbers"""


def split_text(fleet: SplitPlan) -> RenderableType:
    """A round for the terminal: what each device holds, when it is served, and how the round compares."""
    return Group(_table(fleet), bulleted(split_sentences(fleet)))


def _table(fleet: SplitPlan) -> Table:
    caption = f"A round of {fleet.steps} steps of {printable(fleet.model)}, in the order in which devices are served"
    table = captioned(caption)
    unit = unit_of(min(member.budget_bytes for member in fleet.members))
    headings = ("member", "layers", "steps", "each", "served from", "to", "answers after")
    for heading in (*headings, f"peak of budget, {unit.name}", "of the server's", "device"):
        table.add_column(heading, justify="left" if heading in ("member", "device") else "right", overflow="fold")
    for member in fleet.taking:
        assert member.step_seconds is not None
        assert member.peak_bytes is not None
        assert member.server_peak_bytes is not None
        server = fleet.server.budget_bytes
        table.add_row(
            Text(member.name),
            str(member.layers),
            str(member.steps),
            format_seconds(member.step_seconds),
            format_seconds(member.begin_seconds),
            format_seconds(member.begin_seconds + member.service_seconds),
            format_seconds(member.round_seconds),
            f"{unit.amount(member.peak_bytes)} of {unit.amount(member.budget_bytes)}",
            f"{unit.amount(member.server_peak_bytes)} of {unit.amount(server)}",
            Text(printable(member.device)),
        )
    return table


def _advice(fleet: SplitPlan, baseline: SplitBaseline) -> str:
    """What to leave out for shorter rounds: a device, or the split; "" where that is not what a way to make a round says."""
    seconds = baseline.makespan_seconds or 0.0
    shorter, longer = format_seconds(seconds), format_seconds(fleet.makespan_seconds)
    if baseline.name == "without a device":
        (name,) = (member.name for member in fleet.taking if member.name not in baseline.layers)
        return f"Leave out {name}, unless its data are needed: without it a round takes {shorter}, with it {longer}."
    if baseline.name == "whole models" and seconds < fleet.makespan_seconds:
        return f"Leave out the server: where every device holds all layers a round takes {shorter}, with the split {longer}."
    return ""


def split_sentences(fleet: SplitPlan) -> list[str]:
    """What is to be said of a round."""
    order = "no order of services is shorter"
    if fleet.order_gap > SLACK:
        order = f"within {percent_within(fleet.order_gap)} of the best cuts and order for these plans"
    first = (
        f"A round takes {format_seconds(fleet.makespan_seconds)}, within {percent_within(fleet.gap)} of the best there can be;"
        f" {order}. The adapter has {format_size(fleet.adapter_bytes)}."
    )
    result = [
        first,
        "The result is that of devices that hold all layers, to the bit."
        if fleet.bit_identical
        else f"The result is not to the bit that of devices that hold all layers; profiles differ in {'; '.join(fleet.differences)}.",
        "Devices send the labels of their data to the server, which computes the loss.",
    ]
    for baseline in fleet.baselines:
        if baseline.makespan_seconds is None:
            result.append(f"With {baseline.name} there would be no round: {baseline.reason}.")
        elif advice := _advice(fleet, baseline):
            result.insert(1, advice)
        else:
            times = baseline.makespan_seconds / fleet.makespan_seconds
            result.append(
                f"With {baseline.name} it would take {format_seconds(baseline.makespan_seconds)}, {times:.2f} times as long."
            )
    result.extend(f"{member.name} takes no part: {member.reason}." for member in fleet.members if not member.steps)
    return [printable(sentence) for sentence in result]
