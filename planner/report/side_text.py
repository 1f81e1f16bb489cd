"""The plan of a device and a server that train a side network, in sentences and a table, for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from tightfit.planner.fleet.schema import SidePlan
from tightfit.planner.report.explain import percent_within
from tightfit.planner.report.render import bulleted, plain_table
from tightfit.runtime.common.units import format_seconds, format_size, printable, unit_of


def side_text(fleet: SidePlan) -> RenderableType:
    """A step for the terminal: what both members do, what passes between them, and what comes of it."""
    return Group(_table(fleet), bulleted(side_sentences(fleet)))


def _table(fleet: SidePlan) -> Table:
    unit = unit_of(min(member.budget_bytes for member in fleet.members))
    rows = [
        [
            member.name,
            "the frozen model's forward" if member.does == "forward" else "trains the side network",
            format_seconds(member.micro_batch_seconds),
            f"{unit.amount(member.peak_bytes)} of {unit.amount(member.budget_bytes)}",
            unit.amount(member.exchange_bytes),
            printable(member.device),
        ]
        for member in fleet.members
    ]
    return plain_table(
        f"A step of {fleet.micro_batches} micro-batches of {fleet.batch} rows of {printable(fleet.model)}",
        ["member", "does", "micro-batch", f"peak of budget, {unit.name}", "of it messages", "device"],
        rows,
    )


def side_sentences(fleet: SidePlan) -> list[str]:
    """What is to be said of a step."""
    device, server = fleet.members
    rounded = f"rounded to {fleet.bits} bits" if fleet.bits else "as they are"
    blocks = ", ".join(str(block) for block in fleet.blocks)
    link = fleet.message_bytes / min(device.link.up_bytes_per_second, server.link.down_bytes_per_second)
    seconds = {
        device.name: device.micro_batch_seconds,
        "the link": link,
        server.name: server.micro_batch_seconds,
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    step = (
        f"A step takes {format_seconds(fleet.makespan_seconds)}, within {percent_within(fleet.gap)} of the best there"
        f" can be; {slowest} sets its pace with {format_seconds(seconds[slowest])} for a micro-batch."
    )
    sent = (
        f"{device.name} sends {format_size(fleet.message_bytes)} for a micro-batch, which take {format_seconds(link)}:"
        f" its labels, and the outputs of the model's blocks {blocks} (counted from 0), {rounded}. No gradient comes"
        " back."
    )
    trained = (
        f"The result is a side network with adapters of rank {fleet.rank}, in {server.name}'s folder side/: no adapter"
        f" of the model, and of use only with what {device.name}'s model computes."
    )
    result = [step, sent, trained]
    if fleet.device_alone_seconds is None:
        result.append(
            f"Alone {device.name} cannot train the model's adapter within {format_size(device.budget_bytes)}."
        )
    else:
        alone = fleet.device_alone_seconds
        result.append(
            f"Backpropagation through the model's adapter would take {device.name} alone {format_seconds(alone)},"
            f" {alone / fleet.makespan_seconds:.2f} times as long; it follows another gradient, so that steps do not"
            " compare."
        )
    estimated = [member.name for member in fleet.members if not member.measured]
    if estimated:
        result.append(
            f"Times of {' and '.join(estimated)} are estimated, not measured, so that this plan cannot be run."
        )
    return [printable(sentence) for sentence in result]
