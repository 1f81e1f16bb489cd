"""Chooses the length of a run's sequences so that every sample of the data has room, and shorter lengths for short samples.

Samples are tokenised one by one, and kept in a file where the run is to use them; PyTorch is not imported.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tightfit.profiles.sources.lookup import longest_sequence, vocabulary
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.data.preparation import Preparation
from tightfit.runtime.data.samples import data_files
from tightfit.runtime.data.tokenization import (
    PREPARED,
    RANDOM,
    Purpose,
    check_prepared,
    longest_sample,
    tokens_in,
    way_on,
)
from tightfit.runtime.engine.training.records import RecordFile

STEP = 32
"""The length is a multiple of this: kernels work on blocks of 16 or 32 rows, and a profile in the cache then serves data
that are a little longer or shorter as well."""
MOST = 2048
"""The longest that is chosen unasked: every row takes as much memory and time as the longest sample."""
MADE_UP = 256
"""for made-up tokens, which have no length of their own"""
BUCKET_STEP = 8
"""Shorter lengths are multiples of this."""
MOST_BUCKETS = 2
"""shorter lengths that are chosen unasked: the kernels of each take memory in a run, which a profile tells"""
WORTH = 0.05
"""share of the places in all rows that one more length has to save"""
LOOKED_AT = 256
"""samples between two reports of the progress"""


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
    lengths: Counter[int] | None = None,
    stages: Callable[[str, int, int], None] | None = None,
) -> tuple[int, str]:
    """(tokens of a sequence, in words why) for a language model, its training data and its held-out data.

    That is `seq` if it is given, else the longest sample, rounded up to a multiple of `STEP`, and at most `MOST` and what the model
    was made for. `lengths` takes how many training samples of which length there are, for `choose_buckets`.
    Longer samples are cut if `truncate`, and otherwise an error that says how to go on; a line that could not be
    tokenised within the run's `budget` in bytes is refused. `columns` and `pairs` are as for `tightfit.runtime.data.tokenization.prepare`. `stages(what, done, total)` is called now and then. `keep` is a folder
    in which the samples are kept as tokens (`tokens_in`), so that the run need not tokenise them again. Raises
    InputError and CapError as `tightfit.runtime.data.tokenization.prepare` does.
    """
    own = longest_sequence(model)
    most = min(MOST, own or MOST) if seq is None else seq
    asked = "as it was asked for"
    settled: tuple[int, str] | None = None
    if data == RANDOM:
        settled = (min(MADE_UP, most), "its tokens are made up") if seq is None else (seq, asked)
    elif data.endswith(PREPARED):
        with RecordFile.open(Path(data)) as records:
            if lengths is not None:
                lengths.update(map(records.length, range(len(records))))
            settled = (records.seq, "the data were prepared so") if seq is None else (seq, asked)
    most = most if settled is None else settled[0]
    preparation: Preparation | None = None
    words: Vocabulary | None = None
    purposes: dict[Purpose, str | None] = {"train": data, "evaluate": evaluation}
    longest = 0
    for purpose, path in purposes.items():
        if path is None or path == RANDOM or path.endswith(PREPARED):
            continue
        if preparation is None:
            preparation = Preparation(budget)
            words = vocabulary(model)
            preparation.check("loading the tokenizer")

        def progress(done: int, what: str = f"measuring the samples of {path}") -> None:
            if stages and done % LOOKED_AT == 1:
                stages(what, done, done)

        found = longest_sample(
            path,
            words,
            most=most,
            purpose=purpose,
            too_long="truncate" if truncate else "refuse",
            way_on=way_on(lambda longest: spelled("seq", longest), own),
            columns=columns,
            pairs=pairs,
            progress=progress,
            preparation=preparation,
            keep=None if keep is None else tokens_in(keep, purpose),
            lengths=lengths if purpose == "train" else None,
        )
        longest = max(longest, found)
    if settled is None and seq is not None:
        settled = seq, asked
    if settled is None:
        chosen = min(most, -(-longest // STEP) * STEP)
        rest = "; samples are cut there, and texts go on in the next row" if longest > chosen else ""
        settled = chosen, f"the longest sample of the data has {longest} positions{rest}"
    for path in (data, evaluation):
        if path is not None and path.endswith(PREPARED):
            check_prepared(Path(path), seq=settled[0], vocab_size=None, pairs=pairs)
    return settled


def choose_buckets(lengths: Mapping[int, int], seq: int) -> tuple[tuple[int, ...], str]:
    """(lengths below `seq` at which a step is worth having, in words why) for data with so many samples of each length.

    Those of the at most `MOST_BUCKETS` multiples of `BUCKET_STEP` are chosen with which rows have the fewest places in all, if each is
    `WORTH` it.
    """
    if not lengths:
        return (), "the tokens are made up, and fill their rows"
    within = list(itertools.accumulate(lengths.get(length, 0) for length in range(seq)))
    """samples of at most so many positions"""
    samples = sum(lengths.values())

    def places(chosen: Sequence[int]) -> float:
        """Places in the rows of all samples, as a share of those without shorter lengths."""
        counts = [within[length] for length in chosen]
        own = sum((now - before) * end for before, now, end in zip([0, *counts], counts, chosen))
        return (own + (samples - max(counts, default=0)) * seq) / (samples * seq)

    best: tuple[int, ...] = ()
    for number in range(1, MOST_BUCKETS + 1):
        found = min(itertools.combinations(range(BUCKET_STEP, seq, BUCKET_STEP), number), key=places, default=best)
        if places(best) - places(found) < WORTH:
            break
        best = found
    saved = f"rows with {1 - places(best):.0%} fewer places"
    return best, saved if best else "samples are of about one length"
