"""Tables of results, written where people read them: one file of docs/benchmarks/ for each benchmark, with its command,
machine and date.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tightfit.runtime.common.processor import cpu_name

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def machine() -> str:
    """What ran it, in words."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every column but the first is aligned to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


class Report:
    """Tables and sentences that a benchmark prints as it goes, and writes as a page when it is asked to."""

    def __init__(self, width: int = 150) -> None:
        self.console = Console(width=width)
        self.parts: list[str] = []

    def table(self, table: Table) -> None:
        """Print a table; the page has it in Markdown, its title above it."""
        self.console.print(table)
        headings = [str(column.header) for column in table.columns]
        rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
        title = f"**{table.title}**\n\n" if table.title else ""
        self.parts.append(title + markdown(headings, rows))

    def text(self, text: str) -> None:
        """Print a sentence; it is a paragraph of the page."""
        self.console.print(text)
        self.parts.append(f"{text}\n")

    def write(self, name: str, title: str, notes: str) -> Path:
        """Write ``docs/benchmarks/NAME.md``: the notes, the command that was typed, date and machine, and what was
        printed.
        """
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        when = dt.datetime.now(dt.UTC).date().isoformat()
        path = FOLDER / f"{name}.md"
        path.write_text("\n".join([f"# {title}", "", notes, "", f"`{command}`, {when}, {machine()}.", "", *self.parts]))
        return path
