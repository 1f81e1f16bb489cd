"""Shows data as a run would read them: which of a sample's tokens are learned, what is cut or refused, how much is
padding, and how many batches they are.

Samples go through the same pass that prepares a run's records (`tightfit.runtime.data.tokenization`), and the records
become batches as in a run; only the beginning of large data is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from tightfit.profiles.schema import Profile
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.kept_tokens import TokenSequence
from tightfit.runtime.data.samples import checked_columns, data_files
from tightfit.runtime.data.token_bytes import token_bytes
from tightfit.runtime.data.tokenization import DataPass, TooLong, encoder_for, pad_token_of, padding_tokens, plan_again
from tightfit.runtime.engine.training.batches import open_batches
from tightfit.runtime.engine.training.records import RecordFile, RecordWriter

MOST_SAMPLES, MOST_SECONDS = 20_000, 30.0
"""samples that are read, and for how long"""
MOST_SHOWN = 50
"""samples that are shown, and lines that are refused"""
MOST_LETTERS = 200_000
"""of all samples that are shown; one of a long row takes thousands"""
COMMON_LENGTHS = tuple(sorted(factor << power for power in range(3, 18) for factor in (2, 3)))
"""positions for which steps are measured: a sample may fit into fewer than a profile has"""
SEED = 0
"""of the order of the samples in the epoch whose padding is counted"""
Part = Literal["sample", "text", "chosen", "rejected"]
Read = Callable[[int], None]
"""called with the number of samples that were read"""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some of a sample's tokens, as text."""

    text: str
    trained: bool
    """whether the model learns to write it"""


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    line: int | str
    """line of its file from 1, or ``row N``"""
    file: str
    part: Part
    """text: all of it is learned, and it goes on in the next row; chosen, rejected: one of a pair's two answers"""
    pieces: list[Piece]
    """as far as they fit into a row"""
    tokens: int
    cut: int
    """tokens that do not fit"""


@dataclass(frozen=True, kw_only=True)
class Refused:
    line: int | str
    file: str
    why: str


@dataclass(kw_only=True)
class Preview:
    samples: list[ShownSample] = field(default_factory=list)
    """the first ones"""
    refused: list[Refused] = field(default_factory=list)
    """the first ones"""
    counted: int = 0
    """lines that were read"""
    refused_count: int = 0
    cut: int = 0
    """samples of which something is cut"""
    whole: bool = True
    """whether all of the data was read"""
    longest: int = 0
    """tokens of the longest sample that is not a text"""
    seq: int = 0
    padding_share: float | None = None
    """of the places in an epoch's rows; None: nothing was left to train on"""
    epoch_steps: float = 0.0
    """steps that go once through what was read"""
    evaluation_batches: int = 0
    """batches of an evaluation of what was read"""
    longer: list[tuple[int, int]] = field(default_factory=list)
    """(a common length below that of the profile, samples that are longer); empty where there are texts, which fill all
    rows
    """


def preview(
    data: str,
    vocabulary: Vocabulary | None,
    profile: Profile,
    folder: Path,
    *,
    columns: Mapping[str, str] | None = None,
    too_long: TooLong = "refuse",
    packing: bool = False,
    progress: Read | None = None,
) -> Preview:
    """What a run of a plan of `profile` would make of `data`, which are files of samples; its records are written into
    `folder`.

    Raises InputError for data that cannot be read at all, and for a model without a tokenizer.
    """
    assert profile.seq is not None
    vocab_size, pairs = profile.model.config["vocab_size"], profile.model.preference is not None
    encoder = encoder_for(data, vocabulary, vocab_size)
    texts = _Texts(encoder.vocabulary, vocab_size)
    ends = time.monotonic() + MOST_SECONDS
    shown, letters = Preview(seq=profile.seq), 0
    lengths: list[int] | None = []
    path = folder / "preview.records"
    pad = pad_token_of(padding_tokens(vocabulary), vocab_size)
    with RecordWriter(path, seq=profile.seq, pad_token=pad, vocab_size=vocab_size, source=data, pairs=pairs) as writer:
        samples = DataPass(writer, encoder, "train", too_long, plan_again(None), pairs=pairs)
        for file, line, sequences in samples.each(data_files(data), None, checked_columns(columns)):
            shown.counted += 1
            if isinstance(sequences, InputError):
                shown.refused_count += 1
                if len(shown.refused) < MOST_SHOWN:
                    shown.refused.append(Refused(line=line, file=file.name, why=str(sequences)))
            else:
                shown.cut += any(_excess(sequence, profile.seq) for sequence in sequences)
                if any(sequence.predicted is None for sequence in sequences):
                    lengths = None
                elif lengths is not None:
                    lengths.append(max(len(sequence.ids) - 1 for sequence in sequences))
                if len(shown.samples) < MOST_SHOWN and letters < MOST_LETTERS:
                    parts = [_shown(samples, sequences, texts, place, line, file) for place in range(len(sequences))]
                    letters += sum(len(piece.text) for part in parts for piece in part.pieces)
                    shown.samples += parts
            if progress:
                progress(shown.counted)
            if shown.counted == MOST_SAMPLES or time.monotonic() > ends:
                shown.whole = False
                break
        samples.flush(everything=True)
        shown.longest = samples.longest
        written = writer.count
    if written:
        _count_batches(shown, path, profile, packing=packing)
    if lengths:
        shown.longer = [
            (common, sum(length > common for length in lengths)) for common in COMMON_LENGTHS if common < profile.seq
        ]
    return shown


def _excess(sequence: TokenSequence, seq: int) -> int:
    """Tokens that have no room in a row; of a text, which goes on in the next, none."""
    return 0 if sequence.predicted is None else max(0, len(sequence.ids) - 1 - seq)


def _shown(
    samples: DataPass, sequences: Sequence[TokenSequence], texts: _Texts, place: int, line: int | str, file: Path
) -> ShownSample:
    """One sequence of a sample as `DataPass` writes it."""
    sequence, seq = sequences[place], samples.writer.seq
    parts: tuple[Part, ...] = ("chosen", "rejected") if samples.pairs else ("sample",)
    if sequence.predicted is None:
        tokens = [(token, number > 0) for number, token in enumerate(sequence.ids[: seq + 1])]
        parts = ("text",)
    else:
        # What is cut at the front of a pair is the same of both.
        front = max(samples.front((each.ids, each.predicted)) for each in sequences if each.predicted is not None)
        kept = slice(front, front + seq + 1)
        tokens = list(zip(sequence.ids[kept], sequence.predicted[kept]))
        tokens[:1] = [(tokens[0][0], False)]  # there is nothing before it from which it could be predicted
    return ShownSample(
        line=line,
        file=file.name,
        part=parts[place % len(parts)],
        pieces=texts.pieces(tokens),
        tokens=len(sequence.ids),
        cut=_excess(sequence, seq),
    )


class _Texts:
    """The texts of tokens, those of special tokens too."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self._vocabulary = vocabulary
        try:
            self._bytes = list(token_bytes(vocabulary, vocab_size, special=True)[0])
        except InputError:  # a decoder that does not say what a single token stands for
            self._bytes = []

    def pieces(self, tokens: Sequence[tuple[int, bool]]) -> list[Piece]:
        """The text of (token, whether it is learned), as few pieces as there can be."""
        return [
            Piece(text=b"".join(self._of(token) for token, _ in run).decode(errors="replace"), trained=trained)
            for trained, run in groupby(tokens, key=lambda pair: pair[1])
        ]

    def _of(self, token: int) -> bytes:
        if self._bytes:
            return self._bytes[token]
        return (self._vocabulary.tokenizer.id_to_token(token) or "").encode()


def _count_batches(shown: Preview, path: Path, profile: Profile, *, packing: bool) -> None:
    """Say of the records at `path` how many batches they are, in an epoch and in an evaluation, and which share of an
    epoch's places holds no token.
    """
    preference = profile.model.preference
    with RecordFile.open(path) as records:
        tokens = records.tokens
    batches = open_batches(
        str(path),
        SEED,
        packing=packing,
        loss=None if preference is None else preference.loss,
    )
    rows = profile.batch * profile.model.rows_of_sample
    try:
        shown.epoch_steps = batches.epoch_steps(profile.batch)
        inputs: Any = [SimpleNamespace(shape=(rows,))]  # of which the number of rows alone is asked
        shown.evaluation_batches = batches.evaluation_count(inputs)
    finally:
        batches.close()
    # The last step of an epoch may go on in the next one.
    shown.padding_share = 1 - tokens / (rows * shown.seq * shown.epoch_steps)
