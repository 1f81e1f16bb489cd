"""A federated plan in sentences and a table, for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tightfit.planner.fleet.federated_schema import FederatedPlan
from tightfit.planner.report.explain import percent_within
from tightfit.planner.report.render import bulleted, captioned
from tightfit.runtime.common.units import format_seconds, format_size, printable, unit_of


def federated_text(fleet: FederatedPlan) -> RenderableType:
    """A round for the terminal: what each device does in it, and how it compares."""
    return Group(_table(fleet), bulleted(federated_sentences(fleet)))


def _table(fleet: FederatedPlan) -> Table:
    caption = f"A round of {fleet.steps} local steps of {printable(fleet.model)}"
    table = captioned(caption)
    unit = unit_of(min(member.budget_bytes for member in fleet.members))
    for heading in (
        "member",
        "steps",
        "each",
        "answers after",
        f"peak of budget, {unit.name}",
        "Flower",
        "rank",
        "device",
    ):
        table.add_column(heading, justify="left" if heading in ("member", "device") else "right", overflow="fold")
    for member in fleet.taking:
        assert member.step_seconds is not None
        assert member.peak_bytes is not None
        table.add_row(
            Text(member.name),
            str(member.steps),
            format_seconds(member.step_seconds),
            format_seconds(member.round_seconds),
            f"{unit.amount(member.peak_bytes)} of {unit.amount(member.budget_bytes)}",
            unit.amount(member.flower_bytes),
            str(member.rank),
            Text(printable(member.device)),
        )
    return table


def federated_sentences(fleet: FederatedPlan) -> list[str]:
    """What is to be said of a round."""
    first = (
        f"A round takes {format_seconds(fleet.makespan_seconds)}, within {percent_within(fleet.gap)} of the best there can"
        f" be; {format_size(fleet.adapter_bytes)} of adapter go to each device, of rank {fleet.rank}."
    )
    result = [first]
    for baseline in fleet.baselines:
        if baseline.makespan_seconds is None:
            result.append(f"With {baseline.name} there would be no round: {baseline.reason}.")
        else:
            times = baseline.makespan_seconds / fleet.makespan_seconds
            result.append(
                f"With {baseline.name} it would take {format_seconds(baseline.makespan_seconds)}, {times:.2f} times as long."
            )
    for price in fleet.prices:
        result.append(
            f"{price.member}: with {format_size(price.memory_bytes)} more memory a round is"
            f" {format_seconds(price.memory_gain_seconds)} shorter, with a link twice as fast"
            f" {format_seconds(price.link_gain_seconds)}."
        )
    result.extend(f"{member.name} takes no part: {member.reason}." for member in fleet.members if not member.steps)
    return [printable(sentence) for sentence in result]
