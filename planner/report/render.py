"""A comparison and a plan as tables for the terminal; what other tables there begin with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from tightfit.planner.report.comparison_words import Cell, table_rows
from tightfit.planner.report.explanation import Explanation
from tightfit.planner.report.memory_categories import bands, policies_of
from tightfit.planner.schema import Plan
from tightfit.runtime.common.units import format_size, unit_of

UNLIMITED = 1 << 16
"""characters of a line that nothing cuts"""


def bulleted(sentences: Iterable[str]) -> Table:
    """Sentences, each on a line of its own."""
    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row("•", Text(sentence))
    return table


def captioned(caption: str) -> Table:
    """A table of a fleet, still without columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=Text(caption))
    table.title_justify = "left"
    return table


class _FittedTable:
    """A comparison's table; where it is wider than the terminal, cells and headings take several lines."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        wide = self._table(narrow=False)
        fits = console.measure(wide, options=options.update_width(UNLIMITED)).maximum <= options.max_width
        yield wide if fits else self._table(narrow=True)

    def _table(self, *, narrow: bool) -> Table:
        plans, device = self._plans, self._plans[0].device
        names = policies_of(plans)
        units = {
            unit_of(plan.minimum_budget_bytes).name for plan in plans if not plan.fits and plan.minimum_budget_bytes
        }
        unit = units.pop() if len(units) == 1 else None if units else "MiB"
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=Text(
                f"{device.name}, {'measured' if device.measured else 'estimated'}: seconds per step by the model; or"
                f" the smallest budget that would be enough{'' if unit is None else f', in {unit}'}"
            ),
            title_justify="left",
            pad_edge=False,
        )
        for name in ["budget", *names]:
            table.add_column(name.replace("-", "-\n") if narrow else name, justify="right", overflow="fold")
        for budget, row in table_rows(plans, names):
            cells = [Text(format_size(budget)), *(_text(cell, unit) for cell in row)]
            table.add_row(*(Text("\n").join(cell.split(" ")) if narrow else cell for cell in cells))
        return table


def comparison_table(plans: Sequence[Plan]) -> RenderableType:
    """Seconds per step on one device, by budget and policy; where a budget is too small, the smallest that is
    enough.
    """
    return _FittedTable(plans)


def peak_table(plan: Plan, explanation: Explanation) -> Table:
    """What fills the memory at the plan's peak: what its fullest instruction holds, and what others make the process
    hold.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("at the peak")
    table.add_column("", justify="right")
    table.add_column("", justify="left")
    for part in explanation.memory:
        (band,) = bands([part.name])
        width = max(1, round(40 * part.bytes / plan.peak_bytes))
        table.add_row(Text(part.label), format_size(part.bytes), f"[{band.dark}]{'█' * width}[/]")
    if explanation.memory:
        table.add_row(
            "[bold]together",
            f"[bold]{format_size(sum(part.bytes for part in explanation.memory))}",
            f"of {format_size(plan.budget_bytes)}",
            end_section=True,
        )
    return table


def _text(cell: Cell, unit: str | None) -> Text:
    """`unit`: the one of budgets that the heading names for all of the table, as it does seconds."""
    style = {"none": "red", "best": "bold green", "": ""}[cell.role]
    return Text(cell.text.replace(" s", "", 1).replace(f" {unit}", "", 1), style=style)
