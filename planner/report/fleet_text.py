"""A fleet's plan in a table and sentences, for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tightfit.planner.fleet.parts import link_bytes, message_bytes, passing_of
from tightfit.planner.fleet.schema import SERVER, Baseline, FleetPlan, Part, Replica
from tightfit.planner.report.explain import LEAST_SHARE, percent_within
from tightfit.planner.report.render import bulleted, captioned
from tightfit.runtime.common.units import Unit, format_seconds, format_size, printable, unit_of

IDLE_SHARE = 0.02
"""a device that waits for less of the step than this is not told of"""
ORDER_SLACK = 1e-5
"""of a round: the order is found in whole numbers"""
NAMES = ("member", "from … to", "does", "device")
"""columns that hold names, which take several lines where the terminal is narrow"""
PEAK, MESSAGES = "peak of budget", "of it messages"

COLUMNS = {
    "data parallel": ("member", "micro-batches", "each", "together", PEAK, "gradients", "states", "device"),
    "pipeline": ("member", "layers", "from … to", "ahead", "micro-batch", "forward alone", PEAK, "device"),
    "mobillm": ("member", "does", "micro-batch", PEAK, MESSAGES, "device"),
    "federated": ("member", "steps", "each", "answers after", PEAK, "Flower", "rank", "device"),
    "split federated": (
        "member", "layers", "steps", "each", "served from", "to", "answers after", PEAK, "of the server's", "device",
    ),
}  # fmt: skip
"""headings by kind of fleet"""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table in words: its first column says what a row is about."""

    caption: str
    headings: list[str]
    rows: list[list[str]]


def fleet_text(fleet: FleetPlan) -> RenderableType:
    """A fleet's plan for the terminal: what each device does, and sentences about the step or the round."""
    return Group(_table(fleet_sheet(fleet)), bulleted(fleet_sentences(fleet)))


def _table(sheet: Sheet) -> Table:
    """In a narrow terminal headings and names take several lines; figures are never cut."""
    table = captioned(sheet.caption)
    for number, heading in enumerate(sheet.headings):
        longest = max((len(row[number]) for row in sheet.rows), default=0)
        table.add_column(
            heading.replace("-", "-\n"),
            justify="left" if heading in NAMES else "right",
            overflow="fold",
            min_width=min(longest, 4) if heading in NAMES else longest,
        )
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return table


# --- the table --------------------------------------------------------------------------------------------------------


def fleet_sheet(fleet: FleetPlan) -> Sheet:
    """What each member that computes does and holds, in the order of the replicas."""
    columns = COLUMNS[fleet.kind]
    unit = unit_of(min((fleet.member(part.member).budget_bytes for part in fleet.parts), default=0))
    rows = [
        [cells[column]() for column in columns]
        for replica in fleet.replicas
        for part in (replica.parts[:1] if fleet.in_rounds else replica.parts)
        for cells in [_cells(fleet, replica, part, unit)]
    ]
    headings = [f"{column}, {unit.name}" if column == PEAK else column for column in columns]
    return Sheet(caption=_caption(fleet), headings=headings, rows=rows)


def _caption(fleet: FleetPlan) -> str:
    count, model = fleet.micro_batches, printable(fleet.model)
    return {
        "data parallel": "The chain, in the order in which gradients are added up",
        "pipeline": "The pipeline, in the order of its layers",
        "mobillm": f"A step of {count} micro-batches of {fleet.batch} rows of {model}",
        "federated": f"A round of {count} local steps of {model}",
        "split federated": f"A round of {count} steps of {model}, in the order in which devices are served",
    }[fleet.kind]


def _cells(fleet: FleetPlan, replica: Replica, part: Part, unit: Unit) -> dict[str, Callable[[], str]]:
    """By heading, of any kind: a part's cell, which is made where its fleet has that column."""
    member, turn = fleet.member(part.member), replica.turn
    first, last = part.layers or (0, 0)
    return {
        "member": lambda: member.name,
        "device": lambda: printable(member.device),
        PEAK: lambda: f"{unit.amount(part.peak_bytes)} of {unit.amount(member.budget_bytes)}",
        "micro-batches": lambda: f"{replica.micro_batches}",
        "steps": lambda: f"{replica.micro_batches}",
        "micro-batch": lambda: format_seconds(part.micro_batch_seconds),
        "each": lambda: format_seconds(replica.step_seconds if fleet.in_rounds else part.micro_batch_seconds),
        "together": lambda: format_seconds(replica.micro_batches * part.micro_batch_seconds),
        "gradients": lambda: replica.gradients,
        "states": lambda: replica.states,
        "layers": lambda: f"{last - first}",
        "from … to": lambda: printable(" … ".join(dict.fromkeys(part.layer_names))),
        "ahead": lambda: f"{part.ahead}",
        "forward alone": lambda: format_seconds(part.forward_seconds or 0.0),
        "does": lambda: part_words(fleet, part.member),
        MESSAGES: lambda: unit.amount(part.exchange_bytes),
        "Flower": lambda: unit.amount(member.aside_bytes),
        "rank": lambda: f"{replica.rank}",
        "served from": lambda: format_seconds(turn.begin_seconds if turn else 0.0),
        "to": lambda: format_seconds(turn.end_seconds if turn else 0.0),
        "answers after": lambda: format_seconds(turn.answered_seconds if turn else 0.0),
        "of the server's": lambda: (
            f"{unit.amount(replica.parts[-1].peak_bytes)} of {unit.amount(fleet.member(SERVER).budget_bytes)}"
        ),
    }


def part_words(fleet: FleetPlan, name: str) -> str:
    """What the member of that name computes in a step: micro-batches, layers, or a part of its own."""
    part = fleet.part(name)
    if fleet.one_way:
        return "the frozen model's forward" if part is fleet.parts[0] else "trains the side network"
    return " … ".join(part.layer_names) if part.layers else str(fleet.replica(name).micro_batches)


# --- sentences --------------------------------------------------------------------------------------------------------


def fleet_sentences(fleet: FleetPlan) -> list[str]:
    """How long a step or a round takes and why, who takes no part, what fixed rules would take, and whether results
    depend on it.
    """
    sentences = {
        "data parallel": _step_sentences,
        "pipeline": _step_sentences,
        "mobillm": _side_sentences,
        "federated": _round_sentences,
        "split federated": _round_sentences,
    }[fleet.kind](fleet)
    return [printable(sentence) for sentence in sentences]


def _estimated(fleet: FleetPlan) -> list[str]:
    names = [name for name in fleet.names if not fleet.member(name).measured]
    if not names:
        return []
    return [
        (
            f"times of {_listed(names)} are estimated, not measured: this fleet can be planned for, but not be run like"
            " this"
        )
    ]


def _idle(fleet: FleetPlan) -> list[str]:
    return [f"{member.name} takes no part" + (f": {member.reason}" if member.reason else "") for member in fleet.idle]


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# --- a step -----------------------------------------------------------------------------------------------------------


def _step_sentences(fleet: FleetPlan) -> list[str]:
    return [
        *_estimated(fleet),
        _headline(fleet),
        _phases(fleet),
        *_waiting(fleet),
        *_idle(fleet),
        *(_beside(fleet, baseline) for baseline in fleet.baselines),
        _bits(fleet),
    ]


def _headline(fleet: FleetPlan) -> str:
    ways = "cuts" if fleet.cut else "allotment"
    micro_batches = "one micro-batch" if fleet.micro_batches == 1 else f"{fleet.micro_batches} micro-batches"
    return (
        f"one step of {micro_batches} takes {format_seconds(fleet.makespan_seconds)}, within"
        f" {percent_within(fleet.gap)} of the best {ways} and plans of this kind (none takes less than"
        f" {format_seconds(fleet.bound_seconds)}), found in {fleet.solve_seconds:.1f} s"
    )


def _phases(fleet: FleetPlan) -> str:
    if len(fleet.names) == 1:
        return f"{fleet.names[0]} does all of it alone: nothing is exchanged"
    if fleet.cut:
        return _flow(fleet)
    computed = format_seconds(fleet.compute_seconds)
    update = f"{format_seconds(fleet.update_seconds)} for the update"
    return (
        f"all have computed after {computed}; then {format_seconds(fleet.exchange_seconds)} until every device has the"
        f" sum of the gradients ({format_size(fleet.trained_bytes)} over each link, both ways), and {update}"
    )


def _waiting(fleet: FleetPlan) -> list[str]:
    """Which devices have computed before the others, by how much, and why they have no more to do."""
    sentences = []
    for replica in [] if fleet.cut else fleet.replicas:
        (part,) = replica.parts
        each = part.micro_batch_seconds
        spare = fleet.compute_seconds - each * replica.micro_batches
        if spare >= IDLE_SHARE * fleet.makespan_seconds:
            more = f": one micro-batch more would take it {format_seconds(each)}" if each > spare else ""
            sentences.append(
                f"{part.member} has computed its share {format_seconds(spare)} before the slowest, and waits{more}"
            )
    return sentences


def _flow(fleet: FleetPlan) -> str:
    """What passes over the cuts, and whether devices work at once."""
    sizes = sorted(set(link_bytes(fleet)))
    size = format_size(sizes[0]) if len(sizes) == 1 else f"{format_size(sizes[0])} to {format_size(sizes[-1])}"
    cut = "the cut" if len(fleet.parts) == 2 else "each cut"
    ahead = [part.member for part in fleet.parts if part.ahead]
    order = (
        f"{_listed(ahead)} {'goes' if len(ahead) == 1 else 'go'} forward ahead, and forward again when gradients are"
        " there"
        if ahead
        else "one device computes at a time"
    )
    return f"{size} of activations and gradients pass over {cut} in a step, {_form(fleet)}; {order}"


def _form(fleet: FleetPlan) -> str:
    return f"rounded to {fleet.bits} bits" if fleet.bits else "as they are"


def _beside(fleet: FleetPlan, baseline: Baseline) -> str:
    shares = {name: number for name, number in baseline.shares.items() if number}
    if baseline.name == "fastest alone":
        rule = f"the fastest alone ({_listed(list(shares))})" if shares else "the fastest alone"
    else:
        rule = baseline.name + (
            f" ({', '.join(f'{name} {number}' for name, number in shares.items())})" if shares else ""
        )
    if baseline.makespan_seconds is None:
        return f"{rule}: not possible" + (f", {baseline.reason}" if baseline.reason else "")
    if baseline.makespan_seconds <= fleet.makespan_seconds * (1 + LEAST_SHARE):
        return f"{rule} would take as long"
    ratio = f", {baseline.makespan_seconds / fleet.makespan_seconds:.2f} × as long" if fleet.makespan_seconds else ""
    return f"{rule} would take {format_seconds(baseline.makespan_seconds)}{ratio}"


def _bits(fleet: FleetPlan) -> str:
    if fleet.bit_identical:
        return f"results equal those of one process to the bit, whatever {'the cuts' if fleet.cut else 'the allotment'}"
    why = f": {'; '.join(fleet.differences)}" if fleet.differences else ""
    much = "" if fleet.bits else " in their last bits"
    return f"results may differ from those of one process{much}{why}"


# --- a side network ---------------------------------------------------------------------------------------------------


def _side_sentences(fleet: FleetPlan) -> list[str]:
    device, server = fleet.parts
    links = [fleet.member(part.member).link for part in (device, server)]
    size = message_bytes(passing_of(device.up), fleet.bits)
    link = size / min(links[0].up_bytes_per_second, links[1].down_bytes_per_second)
    seconds = {
        device.member: device.micro_batch_seconds,
        "the link": link,
        server.member: server.micro_batch_seconds,
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    blocks = ", ".join(str(block) for block in fleet.blocks)
    (alone,) = fleet.baselines
    budget = format_size(fleet.member(device.member).budget_bytes)
    compared = f"Alone {device.member} cannot train the model's adapter within {budget}."
    if alone.makespan_seconds is not None:
        compared = (
            f"Backpropagation through the model's adapter would take {device.member} alone"
            f" {format_seconds(alone.makespan_seconds)}, {alone.makespan_seconds / fleet.makespan_seconds:.2f} times as"
            " long; it follows another gradient, so that steps do not compare."
        )
    return [
        *_estimated(fleet),
        (
            f"A step takes {format_seconds(fleet.makespan_seconds)}, within {percent_within(fleet.gap)} of the best"
            f" there can be; {slowest} sets its pace with {format_seconds(seconds[slowest])} for a micro-batch."
        ),
        (
            f"{device.member} sends {format_size(size)} for a micro-batch, which take {format_seconds(link)}:"
            f" its labels, and the outputs of the model's blocks {blocks} (counted from 0), {_form(fleet)}. No gradient"
            " comes back."
        ),
        (
            f"The result is a side network with adapters of rank {fleet.rank}, in {server.member}'s folder side/: no"
            f" adapter of the model, and of use only with what {device.member}'s model computes."
        ),
        compared,
    ]


# --- a round ----------------------------------------------------------------------------------------------------------


def _round_sentences(fleet: FleetPlan) -> list[str]:
    size, best = format_size(fleet.trained_bytes), f"within {percent_within(fleet.gap)} of the best there can be"
    first = f"A round takes {format_seconds(fleet.makespan_seconds)}, {best};"
    if fleet.cut:
        order = "no order of services is shorter"
        if fleet.order_gap > ORDER_SLACK:
            order = f"within {percent_within(fleet.order_gap)} of the best cuts and order for these plans"
        sentences = [
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
    else:
        sentences = [f"{first} {size} of adapter go to each device, of rank {fleet.rank}."]
    for baseline in fleet.baselines:
        if baseline.makespan_seconds is None:
            sentences.append(f"With {baseline.name} there would be no round: {baseline.reason}.")
        elif advice := _advice(fleet, baseline):
            sentences.insert(1, advice)
        else:
            times = baseline.makespan_seconds / fleet.makespan_seconds
            sentences.append(
                f"With {baseline.name} it would take {format_seconds(baseline.makespan_seconds)}, {times:.2f} times as"
                " long."
            )
    return [*sentences, *(f"{sentence}." for sentence in _idle(fleet))]


def _advice(fleet: FleetPlan, baseline: Baseline) -> str:
    """What to leave out for shorter rounds: a device, or the split; "" where that is not what a way to make a round
    says.
    """
    seconds = baseline.makespan_seconds or 0.0
    shorter, longer = format_seconds(seconds), format_seconds(fleet.makespan_seconds)
    if baseline.name == "without a device":
        (name,) = (name for name in fleet.names if name not in baseline.shares)
        return f"Leave out {name}, unless its data are needed: without it a round takes {shorter}, with it {longer}."
    if baseline.name == "whole models" and seconds < fleet.makespan_seconds:
        return (
            f"Leave out the server: where every device holds all layers a round takes {shorter}, with the split"
            f" {longer}."
        )
    return ""
