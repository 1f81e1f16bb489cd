"""What each part of the search is worth: the corpus of `golden.py` planned with all parts on, and again with one off.

    python tests/benchmarks/ablation.py [--parts greedy,rounding] [--only CASE,...] [--every 2] [--processes 2]
        [--limit 30] [--processor] [--json FILE] [--write]

Parts joined by a plus are switched off together. A part is switched off only in the searches that ask for it
(`Recorded` notes that). A row of the table says in how many plans that was so, how many of these changed, and the worst
of them: how much longer the step is, how much wider the gap, and how much more or less processor time planning takes,
in all of these plans together. A plan that the part alone makes possible is named. A plan whose search the clock ended,
with the part or without it, differs from run to run: it stands in a column of its own, with the step and the gap that
are worst there. `--processor`: the planner's clock is that of its own process, for figures made beside other programs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

import golden
import processor_clock
import tables
from rich.table import Table

from tightfit.planner.search_options import SearchOptions

PARTS = tuple(field.name for field in fields(SearchOptions))
STEP, SECONDS = 5e-4, 0.05
"""worth keeping: a part without which some step is longer by this share, or planning takes this much longer"""


class Recorded(SearchOptions):
    """Options that note which of them a search asks for."""

    asked: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in PARTS:
            Recorded.asked.add(name)
        return super().__getattribute__(name)


@lru_cache
def case(name: str) -> tuple[str, Any, list[int], float]:
    """The corpus's case of that name, made once in each process."""
    return next(iter(golden.cases({name})))


def planned(name: str, index: int, part: str | None, limit: float | None, processor: bool) -> dict[str, Any]:
    """A row of `golden.py`, with what the search asked for; `part` is off. `limit`: seconds, in place of the case's."""
    _, profile, budgets, usual = case(name)
    Recorded.asked.clear()
    options = Recorded() if part is None else replace(SearchOptions(), **dict.fromkeys(part.split("+"), False))

    def plan() -> dict[str, Any]:
        return golden.row_of(name, profile, budgets[index], limit or usual, options)

    row = processor_clock.beside(plan) if processor else plan()
    return row | {"index": index, "part": part, "asked": sorted(Recorded.asked)}


def worth(part: str, rows: Iterable[dict[str, Any]], base: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """What the plans without the part lack, beside those of `base`."""
    found: dict[str, Any] = {"part": part, "asked": 0, "changed": 0, "step": 0.0, "gap": 0.0, "lost": [], "worst": ""}
    found |= {"clock": 0, "clock_step": 0.0, "clock_gap": 0.0, "clock_worst": ""}
    with_it = without = 0.0
    for row in rows:
        before = base[row["name"], row["index"]]
        found["asked"] += 1
        timed = not (before["deterministic"] and row["deterministic"])
        if timed:
            found["clock"] += 1
        else:
            found["changed"] += any(row[figure] != before[figure] for figure in golden.FIGURES)
            with_it += before["cpu_seconds"]
            without += row["cpu_seconds"]
        if before["minimum_budget_bytes"] and row["minimum_budget_bytes"]:
            slower = row["minimum_budget_bytes"] / before["minimum_budget_bytes"] - 1
        elif row["minimum_budget_bytes"]:
            found["lost"].append(f"{row['name']} at {row['budget_bytes'] / golden.MIB:,.0f} MiB")
            continue
        elif before["minimum_budget_bytes"]:
            continue
        else:
            slower = row["step_seconds"] / before["step_seconds"] - 1
            wider = row["gap"] - before["gap"]
            if timed and wider > found["clock_gap"]:
                found["clock_gap"], found["clock_worst"] = wider, row["name"]
            elif not timed:
                found["gap"] = max(found["gap"], wider)
        if timed:
            found["clock_step"] = max(found["clock_step"], slower)
        elif slower > found["step"]:
            found["step"], found["worst"] = slower, row["name"]
    return found | {"seconds": without / with_it if with_it else 1.0}


def worthless(found: dict[str, Any]) -> bool:
    """Whether switching the part off costs nothing anywhere, searches that the clock ends apart."""
    return not found["lost"] and found["step"] < STEP and found["gap"] < STEP and found["seconds"] < 1 + SECONDS


def main() -> None:
    """Plan, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(PARTS), help="parts; a+b: both off at once"
    )
    parser.add_argument("--only", type=lambda text: set(text.split(",")), default=set(), help="cases by name")
    parser.add_argument("--every", type=int, default=1, help="plan every so many of a case's budgets")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, help="seconds for each plan")
    parser.add_argument("--processor", action="store_true", help="count the seconds of the processor")
    parser.add_argument("--json", type=Path, help="file for all plans; those in it already are not made again")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/ablation.md")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(given.json.read_text()) if given.json and given.json.exists() else []
    done = {(row["name"], row["index"], row["part"]) for row in rows}
    places = [
        (name, index)
        for name, _, budgets, _ in golden.cases(given.only)
        for index in range(0, len(budgets), given.every)
    ]
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:

        def plan_all(wanted: Iterable[tuple[str, int, str | None]]) -> None:
            running = [pool.submit(planned, *one, given.limit, given.processor) for one in wanted if one not in done]
            for number, future in enumerate(as_completed(running), 1):
                row = future.result()
                rows.append(row)
                print(
                    f"{number}/{len(running)} {row['part'] or 'all on'}: {row['name']}, {row['cpu_seconds']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                if given.json:
                    given.json.write_text(json.dumps(rows))

        plan_all((*place, None) for place in places)
        base = {(row["name"], row["index"]): row for row in rows if row["part"] is None}
        plan_all(
            (*place, part)
            for part in given.parts
            for place in places
            if not set(part.split("+")).isdisjoint(base[place]["asked"])
        )
    found = [worth(part, [row for row in rows if row["part"] == part], base) for part in given.parts]
    table = Table("off", "plans that ask", "changed", "longest step", "widest gap", "planning", "by the clock", "lost")
    for one in found:
        table.add_row(
            f"{one['part']}{' *' if worthless(one) else ''}",
            str(one["asked"]),
            str(one["changed"]),
            f"{one['step']:+.3%} {one['worst']}",
            f"{100 * one['gap']:+.3f} points",
            f"{one['seconds']:.2f} x",
            f"{one['clock']}: {one['clock_step']:+.2%}, {100 * one['clock_gap']:+.2f} points {one['clock_worst']}"
            if one["clock"]
            else "",
            "; ".join(one["lost"]),
        )
    report = tables.Report()
    report.table(table)
    paragraphs = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n") if not part.startswith("    ")]
    told = (
        f"A star: worth less than {STEP:.2%} of any step and of any gap and {SECONDS:.0%} of planning, searches that the clock ends"
        f" apart. {len(base)} plans with all parts on, of {', '.join(dict.fromkeys(name for name, _ in base))}. Beside other work on"
        " the machine the ratio of planning varies by 0.15."
    )
    if given.write:
        report.write("ablation", "What each part of the search is worth", "\n\n".join([*paragraphs[1:], told]))


if __name__ == "__main__":
    main()
