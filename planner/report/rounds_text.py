"""A plan of federated rounds, split or not, in sentences and a table, for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from tightfit.planner.fleet.schema import (
    AnyRounds,
    FederatedMember,
    FederatedPlan,
    SplitBaseline,
    SplitMember,
    SplitPlan,
)
from tightfit.planner.report.explain import percent_within
from tightfit.planner.report.render import bulleted, plain_table
from tightfit.runtime.common.units import Unit, format_seconds, format_size, printable, unit_of

SLACK = 1e-5
"""of a round: the order is found in whole numbers"""


def rounds_text(fleet: AnyRounds) -> RenderableType:
    """A round for the terminal: what each device does in it, when it is served, and how the round compares."""
    return Group(_table(fleet), bulleted(rounds_sentences(fleet)))


def _table(fleet: AnyRounds) -> Table:
    unit = unit_of(min(member.budget_bytes for member in fleet.members))
    peak = f"peak of budget, {unit.name}"
    if isinstance(fleet, SplitPlan):
        caption = (
            f"A round of {fleet.steps} steps of {printable(fleet.model)}, in the order in which devices are served"
        )
        headings = ["member", "layers", "steps", "each", "served from", "to", "answers after", peak, "of the server's"]
        rows = [_served(member, fleet.server.budget_bytes, unit) for member in fleet.taking]
    else:
        caption = f"A round of {fleet.steps} local steps of {printable(fleet.model)}"
        headings = ["member", "steps", "each", "answers after", peak, "Flower", "rank"]
        rows = [
            [
                member.name,
                str(member.steps),
                format_seconds(member.step_seconds or 0.0),
                format_seconds(member.round_seconds),
                _of_budget(member, unit),
                unit.amount(member.flower_bytes),
                str(member.rank),
                printable(member.device),
            ]
            for member in fleet.taking
        ]
    return plain_table(caption, [*headings, "device"], rows)


def _served(member: SplitMember, server_bytes: int, unit: Unit) -> list[str]:
    return [
        member.name,
        str(member.layers),
        str(member.steps),
        format_seconds(member.step_seconds or 0.0),
        format_seconds(member.begin_seconds),
        format_seconds(member.begin_seconds + member.service_seconds),
        format_seconds(member.round_seconds),
        _of_budget(member, unit),
        f"{unit.amount(member.server_peak_bytes or 0)} of {unit.amount(server_bytes)}",
        printable(member.device),
    ]


def _of_budget(member: FederatedMember, unit: Unit) -> str:
    return f"{unit.amount(member.peak_bytes or 0)} of {unit.amount(member.budget_bytes)}"


def rounds_sentences(fleet: AnyRounds) -> list[str]:
    """What is to be said of a round."""
    size, best = format_size(fleet.adapter_bytes), f"within {percent_within(fleet.gap)} of the best there can be"
    first = f"A round takes {format_seconds(fleet.makespan_seconds)}, {best};"
    if isinstance(fleet, FederatedPlan):
        result = [f"{first} {size} of adapter go to each device, of rank {fleet.rank}."]
    else:
        order = "no order of services is shorter"
        if fleet.order_gap > SLACK:
            order = f"within {percent_within(fleet.order_gap)} of the best cuts and order for these plans"
        result = [
            f"{first} {order}. The adapter has {size}.",
            (
                "The result is that of devices that hold all layers, to the bit."
                if fleet.bit_identical
                else (
                    "The result is not to the bit that of devices that hold all layers; profiles differ in"
                    f" {'; '.join(fleet.differences)}."
                )
            ),
            "Devices send the labels of their data to the server, which computes the loss.",
        ]
    for baseline in fleet.baselines:
        if baseline.makespan_seconds is None:
            result.append(f"With {baseline.name} there would be no round: {baseline.reason}.")
        elif (
            isinstance(baseline, SplitBaseline)
            and isinstance(fleet, SplitPlan)
            and (advice := _advice(fleet, baseline))
        ):
            result.insert(1, advice)
        else:
            times = baseline.makespan_seconds / fleet.makespan_seconds
            result.append(
                f"With {baseline.name} it would take {format_seconds(baseline.makespan_seconds)}, {times:.2f} times as"
                " long."
            )
    result.extend(f"{member.name} takes no part: {member.reason}." for member in fleet.members if not member.steps)
    return [printable(sentence) for sentence in result]


def _advice(fleet: SplitPlan, baseline: SplitBaseline) -> str:
    """What to leave out for shorter rounds: a device, or the split; "" where that is not what a way to make a round
    says.
    """
    seconds = baseline.makespan_seconds or 0.0
    shorter, longer = format_seconds(seconds), format_seconds(fleet.makespan_seconds)
    if baseline.name == "without a device":
        (name,) = (member.name for member in fleet.taking if member.name not in baseline.layers)
        return f"Leave out {name}, unless its data are needed: without it a round takes {shorter}, with it {longer}."
    if baseline.name == "whole models" and seconds < fleet.makespan_seconds:
        return (
            f"Leave out the server: where every device holds all layers a round takes {shorter}, with the split"
            f" {longer}."
        )
    return ""
