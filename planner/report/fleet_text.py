"""A fleet's plan in sentences and tables, for the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tightfit.planner.fleet.schema import (
    AnyFleet,
    Baseline,
    FederatedPlan,
    FleetPlan,
    PipelineBaseline,
    PipelinePlan,
    SidePlan,
    SplitPlan,
)
from tightfit.planner.report.explain import LEAST_SHARE, percent_within
from tightfit.planner.report.render import bulleted, captioned
from tightfit.planner.report.rounds_text import rounds_text
from tightfit.planner.report.side_text import side_text
from tightfit.runtime.common.units import format_seconds, format_size, printable, unit_of

AnyPlan = FleetPlan | PipelinePlan
IDLE_SHARE = 0.02
"""a device that waits for less of the step than this is not told of"""
NAMES = ("member", "from … to", "device")
"""columns that hold names, which take several lines where the terminal is narrow"""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table in words: its first column says what a row is about."""

    caption: str
    headings: list[str]
    rows: list[list[str]]


def fleet_text(fleet: AnyFleet) -> RenderableType:
    """A fleet's plan for the terminal: its chain, and sentences about the step."""
    if isinstance(fleet, SidePlan):
        return side_text(fleet)
    if isinstance(fleet, FederatedPlan | SplitPlan):
        return rounds_text(fleet)
    return Group(_table(chain_sheet(fleet)), bulleted(fleet_sentences(fleet)))


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


# --- tables -----------------------------------------------------------------------------------------------------------


def chain_sheet(fleet: AnyPlan) -> Sheet:
    """The members that compute, in the order of the chain: what each does and holds."""
    return _stage_sheet(fleet) if isinstance(fleet, PipelinePlan) else _share_sheet(fleet)


def _stage_sheet(fleet: PipelinePlan) -> Sheet:
    unit = unit_of(min((member.budget_bytes for member in fleet.chain), default=0))
    rows = [
        [
            member.name,
            f"{member.last_layer - member.first_layer}",
            printable(" … ".join(dict.fromkeys(member.layer_names))),
            f"{member.ahead}",
            _time(member.micro_batch_seconds),
            _time(member.forward_seconds),
            (
                f"{'–' if member.peak_bytes is None else unit.amount(member.peak_bytes)} of"
                f" {unit.amount(member.budget_bytes)}"
            ),
            printable(member.device),
        ]
        for member in fleet.chain
    ]
    peak = f"peak of budget, {unit.name}"
    headings = ["member", "layers", "from … to", "ahead", "micro-batch", "forward alone", peak, "device"]
    return Sheet(caption="The pipeline, in the order of its layers", headings=headings, rows=rows)


def _share_sheet(fleet: FleetPlan) -> Sheet:
    unit = unit_of(min((member.budget_bytes for member in fleet.chain), default=0))
    rows = [
        [
            member.name,
            f"{member.micro_batches}",
            _time(member.micro_batch_seconds),
            _time(None if (each := member.micro_batch_seconds) is None else each * member.micro_batches),
            (
                f"{'–' if member.peak_bytes is None else unit.amount(member.peak_bytes)} of"
                f" {unit.amount(member.budget_bytes)}"
            ),
            member.gradients,
            member.states,
            printable(member.device),
        ]
        for member in fleet.chain
    ]
    peak = f"peak of budget, {unit.name}"
    headings = ["member", "micro-batches", "each", "together", peak, "gradients", "states", "device"]
    return Sheet(caption="The chain, in the order in which gradients are added up", headings=headings, rows=rows)


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else format_seconds(seconds)


# --- sentences --------------------------------------------------------------------------------------------------------


def fleet_sentences(fleet: AnyPlan) -> list[str]:
    """How long a step takes and why, who takes no part, what fixed rules would take, and whether results depend on
    it.
    """
    said = [
        *_estimated(fleet),
        _headline(fleet),
        _phases(fleet),
        *_waiting(fleet),
        *(
            f"{member.name} takes no part" + (f": {member.reason}" if member.reason else "")
            for member in fleet.members
            if member not in fleet.chain
        ),
        *(_beside(fleet, baseline) for baseline in fleet.baselines),
        _bits(fleet),
    ]
    return [printable(sentence) for sentence in said]


def _estimated(fleet: AnyPlan) -> list[str]:
    names = [member.name for member in fleet.chain if not member.measured]
    if not names:
        return []
    return [
        (
            f"times of {_listed(names)} are estimated, not measured: this fleet can be planned for, but not be run like"
            " this"
        )
    ]


def _headline(fleet: AnyPlan) -> str:
    ways = "cuts" if isinstance(fleet, PipelinePlan) else "allotment"
    micro_batches = "one micro-batch" if fleet.micro_batches == 1 else f"{fleet.micro_batches} micro-batches"
    return (
        f"one step of {micro_batches} takes {format_seconds(fleet.makespan_seconds)}, within"
        f" {percent_within(fleet.gap)} of the best {ways} and plans of this kind (none takes less than"
        f" {format_seconds(fleet.bound_seconds)}), found in {fleet.solve_seconds:.1f} s"
    )


def _phases(fleet: AnyPlan) -> str:
    if len(fleet.chain) == 1:
        return f"{fleet.chain[0].name} does all of it alone: nothing is exchanged"
    if isinstance(fleet, PipelinePlan):
        return _flow(fleet)
    computed = format_seconds(fleet.compute_seconds)
    update = f"{format_seconds(fleet.update_seconds)} for the update"
    return (
        f"all have computed after {computed}; then {format_seconds(fleet.exchange_seconds)} until every device has the"
        f" sum of the gradients ({format_size(fleet.trained_bytes)} over each link, both ways), and {update}"
    )


def _waiting(fleet: AnyPlan) -> list[str]:
    """Which devices have computed before the others, by how much, and why they have no more to do."""
    if isinstance(fleet, PipelinePlan):
        return []
    said = []
    for member in fleet.chain:
        each = member.micro_batch_seconds
        spare = 0.0 if each is None else fleet.compute_seconds - each * member.micro_batches
        if each is not None and spare >= IDLE_SHARE * fleet.makespan_seconds:
            more = f": one micro-batch more would take it {format_seconds(each)}" if each > spare else ""
            said.append(
                f"{member.name} has computed its share {format_seconds(spare)} before the slowest, and waits{more}"
            )
    return said


def _flow(fleet: PipelinePlan) -> str:
    """What passes over the cuts, and whether devices work at once."""
    sizes = sorted(set(fleet.link_bytes))
    told = format_size(sizes[0]) if len(sizes) == 1 else f"{format_size(sizes[0])} to {format_size(sizes[-1])}"
    cut = "the cut" if len(fleet.chain) == 2 else "each cut"
    form = "as they are" if not fleet.bits else f"rounded to {fleet.bits} bits"
    ahead = [member.name for member in fleet.chain if member.ahead]
    order = (
        f"{_listed(ahead)} {'goes' if len(ahead) == 1 else 'go'} forward ahead, and forward again when gradients are"
        " there"
        if ahead
        else "one device computes at a time"
    )
    return f"{told} of activations and gradients pass over {cut} in a step, {form}; {order}"


def _beside(fleet: AnyPlan, baseline: Baseline | PipelineBaseline) -> str:
    parts = baseline.layers if isinstance(baseline, PipelineBaseline) else baseline.micro_batches
    shares = {name: number for name, number in parts.items() if number}
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


def _bits(fleet: AnyPlan) -> str:
    if fleet.bit_identical:
        ways = "the cuts" if isinstance(fleet, PipelinePlan) else "the allotment"
        return f"results equal those of one process to the bit, whatever {ways}"
    why = f": {'; '.join(fleet.differences)}" if fleet.differences else ""
    much = "" if isinstance(fleet, PipelinePlan) and fleet.bits else " in their last bits"
    return f"results may differ from those of one process{much}{why}"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
