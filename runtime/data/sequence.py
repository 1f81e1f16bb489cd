"""Chooses the length of a run's sequences so that every sample of the data has room.

Samples are tokenised one by one, and kept in a file where the run is to use them; PyTorch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tightfit.profiles.sources.lookup import longest_sequence
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.data.samples import data_files
from tightfit.runtime.data.tokenization import PREPARED, RANDOM, Purpose, check_prepared, tokens_file
from tightfit.runtime.data.tokenizing import longest_samples
from tightfit.runtime.engine.training.records import RecordFile

STEP = 32
"""The length is a multiple of this: kernels work on blocks of 16 or 32 rows, and a profile in the cache then serves
data that are a little longer or shorter as well.
"""
MOST = 2048
"""The longest that is chosen unasked: every row takes as much memory and time as the longest sample."""
MADE_UP = 256
"""the length for random tokens, which have none of their own"""


def check_files(*data: str | None) -> None:
    """Raise InputError for data that are no file of samples, nor a folder of them; None is no data."""
    for name in data:
        if name is not None and name != RANDOM and not name.endswith(PREPARED):
            data_files(name)


def choose_seq(
    model: str,
    data: str,
    evaluation: str | None = None,
    *,
    truncate: bool,
    budget: int,
    columns: Mapping[str, str] | None = None,
    keep: Path | None = None,
    pairs: bool = False,
    seq: int | None = None,
    stages: Progress | None = None,
) -> tuple[int, str]:
    """(tokens of a sequence, in words why) for a language model, its training data and its held-out data.

    That is `seq` if it is given, else the longest sample, rounded up to a multiple of `STEP`, and at most `MOST` and
    what the model was made for. Longer samples are cut if `truncate`, and otherwise an error that says how to go on; a
    line that could not be tokenised within the run's `budget` in bytes is refused. `columns` and `pairs` are as for
    `tightfit.runtime.data.tokenization.prepare`. `stages(what, done, total)` is called now and then. `keep` is a folder
    in which the samples are kept as tokens (`tokens_file`), so that the run need not tokenise them again. Raises
    InputError and CapError as `tightfit.runtime.data.tokenization.prepare` does.
    """
    longest_of_model = longest_sequence(model)
    most = min(MOST, longest_of_model or MOST) if seq is None else seq
    requested_reason = "as it was asked for"
    choice: tuple[int, str] | None = None
    if data == RANDOM:
        choice = (min(MADE_UP, most), "its tokens are made up") if seq is None else (seq, requested_reason)
    elif data.endswith(PREPARED):
        with RecordFile.open(Path(data)) as records:
            choice = (records.seq, "the data were prepared so") if seq is None else (seq, requested_reason)
    most = most if choice is None else choice[0]
    purposes: dict[Purpose, str | None] = {"train": data, "evaluate": evaluation}
    samples = {
        purpose: path
        for purpose, path in purposes.items()
        if path is not None and path != RANDOM and not path.endswith(PREPARED)
    }
    longest = 0
    if samples:
        longest = longest_samples(
            samples,
            model,
            budget_bytes=budget,
            report=stages,
            most=most,
            too_long="truncate" if truncate else "refuse",
            positions=longest_of_model,
            columns=columns,
            pairs=pairs,
            keep=None if keep is None else {purpose: str(tokens_file(keep, purpose)) for purpose in samples},
        )
    if choice is None and seq is not None:
        choice = seq, requested_reason
    if choice is None:
        length = min(most, -(-longest // STEP) * STEP)
        cut_note = "; samples are cut there, and texts go on in the next row" if longest > length else ""
        padded = f"; samples that do not share rows are padded to {length}"
        choice = length, f"the longest sample of the data has {longest} positions{cut_note}{padded}"
    for path in (data, evaluation):
        if path is not None and path.endswith(PREPARED):
            check_prepared(Path(path), seq=choice[0], vocab_size=None, pairs=pairs)
    return choice
