"""Tables of results, written where people read them: one file of docs/benchmarks/ for each benchmark, with its command, machine and date."""

from __future__ import annotations

import datetime as dt
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

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


def write(name: str, title: str, notes: str, table: str, command: str | None = None) -> Path:
    """Write ``docs/benchmarks/NAME.md``; `command` is by default the one that was typed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    words = command or " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    path = FOLDER / f"{name}.md"
    path.write_text(
        f"# {title}\n\n{notes}\n\n`{words}`, {dt.datetime.now(dt.UTC).date().isoformat()}, {machine()}.\n\n{table}"
    )
    return path
