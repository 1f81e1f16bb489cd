"""Holds a tokenizer in a process of its own, which has ended before the next phase of a command begins.

The library `tokenizers` keeps a whole vocabulary in memory. So whoever has texts to turn into tokens starts a worker
for it (`tightfit.profiles.worker_process`), which loads the tokenizer, does its work and is gone. What that takes is
known before (`tightfit.profiles.sources.tokenizer_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from tightfit.profiles.sources.tokenizer_file import TokenizerFile
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.profiles.worker_process import run_worker, work
from tightfit.runtime.common.children import own_environment
from tightfit.runtime.common.errors import CapError
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.engine.device.resident import memory

WORK_BYTES = 6 * MIB
"""Most that turning short texts into tokens takes: what the library remembers of words, templates, a sample and its
tokens.
"""
ELSEWHERE = (
    "tokenise the data on a larger machine: a run there leaves them in OUT/data/train.records, which is taken as data"
)
"""what to do where there is no place for a tokenizer"""


def with_tokenizer(
    module: str,
    file: TokenizerFile,
    request: Mapping[str, Any],
    *,
    doing: str,
    budget_bytes: int | None = None,
    longest_bytes: int = 0,
    elsewhere: str | None = ELSEWHERE,
    report: Progress | None = None,
) -> Any:
    """What the worker `module` makes of a request (`work_with_tokenizer`), with the tokenizer in `file`.

    `doing` is what it does, in words. With a budget, that is for this process and the worker together, and what the
    worker does with it is its own; `longest_bytes` are those that its longest text will take in addition, so far as
    there is room. `elsewhere` is what to do where more memory cannot be had, in words. Raises CapError, before the
    worker starts, where the tokenizer has no place in the budget, InputError where that is not free, and what the
    worker raises.
    """
    from tightfit.profiles.sources.tokenizer_memory import KnownMemory  # imports hashlib, which the worker does without

    known = KnownMemory.of(file)
    needed_bytes = known.bytes + WORK_BYTES
    own_bytes = memory().resident
    room_bytes = needed_bytes + longest_bytes if budget_bytes is None else budget_bytes - own_bytes
    otherwise = "" if elsewhere is None else f", or {elsewhere}"
    if needed_bytes > room_bytes:
        enough = format_size(-(-(own_bytes + needed_bytes) // MIB) * MIB)
        raise CapError(
            f"{doing} takes about {format_size(needed_bytes)} in a process of its own for the tokenizer of {file.path},"
            f" beside the {format_size(own_bytes)} of this one, and the budget is"
            f" {format_size(own_bytes + room_bytes)}; give at least {enough}" + otherwise
        )

    def on_message(message: dict[str, Any]) -> None:
        if report is not None:
            report(message["stage"], message["done"], message["total"])

    answer = run_worker(
        command(module),
        {**request, "file": asdict(file)},
        own_environment(TOKENIZERS_PARALLELISM="false"),
        doing=doing,
        predicted_bytes=needed_bytes + min(longest_bytes, room_bytes - needed_bytes),
        instead=f"end other programs{otherwise}",
        on_message=on_message,
    )
    known.keep(answer["loaded_bytes"])
    return answer["result"]


def work_with_tokenizer(do: Callable[[Vocabulary, dict[str, Any], Progress], Any]) -> int:
    """A worker's whole life: loads the tokenizer of its request, and does its work with it; returns the exit code."""

    def loaded(request: dict[str, Any], report: Progress) -> dict[str, Any]:
        vocabulary = TokenizerFile(**request.pop("file")).vocabulary()
        assert vocabulary is not None
        loaded_bytes = memory().peak
        return {"loaded_bytes": loaded_bytes, "result": do(vocabulary, request, report)}

    return work(loaded)
