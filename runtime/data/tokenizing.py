"""Turns data into tokens in a process of its own, which holds the tokenizer and has ended before the next phase begins.

As a worker (`tightfit.profiles.sources.tokenizer_process`) it writes the records of a run, or finds the longest sample
and keeps all as tokens.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tightfit.profiles.sources.tokenizer_process import with_tokenizer, work_with_tokenizer
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.data.preparation import BYTES_PER_BYTE, Preparation, held_to_budget
from tightfit.runtime.data.samples import data_files
from tightfit.runtime.data.tables import kind_of, open_data
from tightfit.runtime.data.tokenization import (
    PREPARED,
    RANDOM,
    Purpose,
    TooLong,
    length_advice,
    longest_sample,
    no_tokenizer,
    prepare,
)
from tightfit.runtime.engine.device.resident import memory

MODULE = "tightfit.runtime.data.tokenizing"
LOOKED_AT = 256
"""samples between two reports of the progress"""
BLOCK = 1 << 20


def tokenise(
    data: str,
    model: str,
    directory: Path,
    *,
    purpose: Purpose = "train",
    warn: Callable[[str], None] | None = None,
    report: Progress | None = None,
    budget_bytes: int | None = None,
    kept: Path | None = None,
    **options: Any,
) -> Path:
    """Write the records of `data` with the tokenizer of what `model` names, as
    `tightfit.runtime.data.tokenization.prepare` does with these options; returns their path.

    The budget is for this process and the one that holds the tokenizer. Raises what `prepare` raises, and CapError
    where the tokenizer has no place.
    """
    path = directory / f"{purpose}.records"
    if kept is not None or data == RANDOM or data.endswith(PREPARED):
        doing = f"tokenising {data}" if kept is None else f"taking the tokens of {data}"
        preparation = None if budget_bytes is None else Preparation(budget_bytes)
        progress = _throttled(doing, report)
        options |= {"warn": warn, "progress": progress, "preparation": preparation, "kept": kept}
        prepare(data, None, directory, purpose=purpose, **options).close()
        return path
    request = {"job": "records", "data": data, "directory": str(directory), "purpose": purpose, **options}
    for warning in _in_worker(model, [data], request, budget_bytes, report):
        if warn is not None:
            warn(warning)
    return path


def longest_samples(
    data: Mapping[Purpose, str],
    model: str,
    *,
    budget_bytes: int | None,
    report: Progress | None,
    **options: Any,
) -> int:
    """Positions of the longest sample of all data, found with the tokenizer of what `model` names as
    `tightfit.runtime.data.tokenization.longest_sample` does. `keep`, by purpose, is where the samples are kept as
    tokens. Raises as `tokenise`.
    """
    request = {"job": "longest", "data": dict(data), **options}
    longest: int = _in_worker(model, list(data.values()), request, budget_bytes, report)
    return longest


def _in_worker(
    model: str, data: list[str], request: dict[str, Any], budget_bytes: int | None, report: Progress | None
) -> Any:
    from tightfit.profiles.sources.lookup import tokenizer_file  # imports pydantic, which the worker does without

    file = tokenizer_file(model)
    if file is None:
        raise no_tokenizer(data[0])
    for name in data:
        data_files(name)  # raises where there are none, before a tokenizer is loaded
    budget_bytes = budget_bytes if held_to_budget() else None
    return with_tokenizer(
        MODULE,
        file,
        {**request, "budget_bytes": budget_bytes, "beside_bytes": memory().resident},
        doing=f"tokenising {' and '.join(data)}",
        budget_bytes=budget_bytes,
        longest_bytes=0 if budget_bytes is None else BYTES_PER_BYTE * max(map(_longest_line, data)),
        report=report,
    )


def _longest_line(name: str) -> int:
    """Bytes of the longest line of data; 0 for tables without lines, and for what cannot be read: whoever reads it says
    so.
    """
    longest = length = 0
    try:
        for file in data_files(name):
            if kind_of(file) not in {None, "CSV"}:
                return 0
            with open_data(file) as content:
                while block := content.read(BLOCK):
                    first, *others = block.split(b"\n")
                    length += len(first)
                    for line in others:
                        longest, length = max(longest, length), len(line)
            longest = max(longest, length)
    except (TightfitError, OSError, EOFError, zlib.error):
        return 0
    return longest


def _throttled(doing: str, report: Progress | None) -> Callable[[int], None]:
    """What is told of each sample, and reports some."""

    def progress(done: int) -> None:
        if report is not None and done % LOOKED_AT == 1:
            report(doing, done, done)

    return progress


def _work(vocabulary: Vocabulary, request: dict[str, Any], report: Progress) -> Any:
    budget_bytes, beside_bytes = request.pop("budget_bytes"), request.pop("beside_bytes")
    preparation = None if budget_bytes is None else Preparation(budget_bytes, beside_bytes)
    if preparation is not None:
        preparation.check("loading the tokenizer")
    return JOBS[request.pop("job")](vocabulary, report, preparation, **request)


def _records(
    vocabulary: Vocabulary,
    report: Progress,
    preparation: Preparation | None,
    *,
    data: str,
    directory: str,
    **options: Any,
) -> list[str]:
    """Write the records of data; returns what is odd about them."""
    warnings: list[str] = []
    options |= {"warn": warnings.append, "progress": _throttled(f"tokenising {data}", report)}
    prepare(data, vocabulary, Path(directory), preparation=preparation, **options).close()
    return warnings


def _longest(
    vocabulary: Vocabulary,
    report: Progress,
    preparation: Preparation | None,
    *,
    data: dict[Purpose, str],
    most: int,
    too_long: TooLong,
    positions: int | None,
    columns: dict[str, str] | None,
    pairs: bool,
    keep: dict[Purpose, str] | None,
) -> int:
    """What `longest_samples` finds."""
    longest = 0
    for purpose, name in data.items():
        find = partial(longest_sample, name, vocabulary, most=most, purpose=purpose, too_long=too_long)
        here = find(
            advice=length_advice(lambda longest: spelled("seq", longest), positions),
            columns=columns,
            pairs=pairs,
            progress=_throttled(f"measuring the samples of {name}", report),
            preparation=preparation,
            keep=None if keep is None else Path(keep[purpose]),
        )
        longest = max(longest, here)
    return longest


JOBS: dict[str, Callable[..., Any]] = {"records": _records, "longest": _longest}

if __name__ == "__main__":
    sys.exit(work_with_tokenizer(_work))
