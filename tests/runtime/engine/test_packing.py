"""Samples that share the rows of batches: each once in an epoch or an evaluation, in rows that hold them, the same for
every process.
"""

from __future__ import annotations

import resource
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.runtime.engine.training.batches import TokenBatches
from tightfit.runtime.engine.training.losses import RecordScores
from tightfit.runtime.engine.training.packing import (
    REMEMBERED,
    WAITING,
    SharedRows,
    batches_of_epoch,
    batches_of_evaluation,
    batches_of_steps,
    rows_of,
)
from tightfit.runtime.engine.training.records import IGNORED, RecordFile, RecordWriter, shuffled

LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=200)


class Lengths:
    """Stands for a record file."""

    pairs = False

    def __init__(self, lengths, seq):
        self.seq, self.lengths = seq, lengths

    def __len__(self):
        return len(self.lengths)

    def length(self, index):
        return self.lengths[index]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_each_sample_comes_once_in_an_epoch_and_fits_its_row(lengths, seed, epoch):
    rows = list(chain.from_iterable(batches_of_epoch(Lengths(lengths, 24), batch=5, seed=seed, epoch=epoch)))
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 24
    turns = {shuffled(turn, len(lengths), seed, epoch): turn for turn in range(len(lengths))}
    met = set()
    for number, row in enumerate(rows):
        met.update(turns[index] for index in row)
        # None waits for more than so many rows.
        assert met.issuperset(range(number + 1 - WAITING))
        # Those of the next row waited already, and had no room.
        room = 24 - sum(lengths[index] for index in row)
        assert number + 1 == len(rows) or lengths[rows[number + 1][0]] > room


def test_short_samples_leave_little_of_the_rows_empty():
    lengths = torch.randint(8, 48, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = list(rows_of(Lengths(lengths, 64), range(3000)))
    assert sum(lengths) / (64 * len(rows)) > 0.96


def test_an_epoch_ends_with_a_batch_and_samples_that_fill_a_row_keep_their_order(tmp_path):
    records = written(tmp_path, [8] * 13, seq=8)
    made = list(batches_of_epoch(records, batch=5, seed=3, epoch=1))
    assert [len(rows) for rows in made] == [5, 5, 3]
    assert list(chain.from_iterable(made)) == [[shuffled(turn, 13, 3, 1)] for turn in range(13)]
    records.close()


def written(folder, lengths, seq):
    """Records of these lengths; sample i has the tokens i."""
    with RecordWriter(folder / "x.records", seq=seq, pad_token=0, vocab_size=999, source="") as writer:
        for number, length in enumerate(lengths, 1):
            writer.add([number] * length, [number] * (length - 1) + [IGNORED], example=number)
    return RecordFile.open(folder / "x.records")


@pytest.fixture
def records(tmp_path):
    """Samples of 1 to 7 tokens, for rows of 12."""
    records = written(tmp_path, [1 + number % 7 for number in range(50)], seq=12)
    yield records
    records.close()


def test_the_batches_of_a_run_are_the_epochs_one_after_the_other(records):
    batches = TokenBatches(str(records.path), 5, packing=True)
    inputs = [torch.empty(3, 12, dtype=torch.int64) for _ in range(3)]
    seen, tokens, epochs = Counter(), [], 0
    for step in range(30):
        tokens.append(batches.training(step, inputs))
        ids, labels, positions = inputs
        found = samples_in(ids, positions)
        assert batches.samples == len(found)
        assert tokens[-1] == sum(map(len, found)) == int((ids > 0).sum())
        assert all(len(set(sample)) == 1 and len(sample) == 1 + (sample[0] - 1) % 7 for sample in found)
        assert int((labels >= 0).sum()) == sum(len(sample) - 1 for sample in found)
        assert torch.equal(labels[labels >= 0], ids[labels >= 0])
        seen.update(sample[0] for sample in found)
        if min(seen.values()) == max(seen.values()) and len(seen) == 50:
            assert sum(tokens) == seen[1] * records.tokens
            epochs += 1
        assert max(seen.values()) <= epochs + 1
    assert epochs == 5  # each ends with a step, the sixth
    batches.close()


def samples_in(ids, positions):
    """The tokens of each sample of a batch, without padding."""
    found = []
    for row, counted in zip(ids.tolist(), positions.tolist()):
        for token, position in zip(row, counted):
            if not position:
                found.append([])
            assert position == len(found[-1])
            found[-1].append(token)
    return [sample for sample in found if sample[0]]


def test_a_step_has_the_same_rows_whatever_was_asked_for_before(records):
    def rows(seed=5):
        return SharedRows(lambda: batches_of_steps(records, batch=3, seed=seed))

    one = rows()
    due = [one.batch(number) for number in range(3 * REMEMBERED)]
    assert due != [rows(seed=6).batch(number) for number in range(3 * REMEMBERED)]
    asked = [100, 100, 101, 98, 100 - REMEMBERED + 1, 3, 0, 150]
    assert [one.batch(number) for number in asked] == [due[number] for number in asked]
    assert [rows().batch(number) for number in (77, 0)] == [due[77], due[0]]


def test_rows_of_many_samples_keep_nothing_in_memory(tmp_path):
    records = written(tmp_path, [1] * 20_000, seq=8)
    rows = SharedRows(lambda: batches_of_steps(records, batch=2, seed=0))
    rows.batch(200)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows.batch(3000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512  # KiB
    records.close()


# --- evaluations ------------------------------------------------------------------------------------------------------

SAMPLES = st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=13), min_size=1, max_size=60)
"""tokens of plain samples and of choices, three of which in a row make a question"""


def loss_of(token, position):
    """Stands for the loss of a token: whole numbers, which float32 adds up exactly, and often equal for two choices."""
    return (7 * token + 3 * position) % 5


@pytest.mark.parametrize("packing", [True, False])
@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES, plain=st.integers(0, 60), batch=st.integers(1, 5))
def test_an_evaluation_counts_each_sample_once_and_by_itself(packing, samples, plain, batch):
    """The figures of `RecordScores` are those that are counted here from the samples, without batches."""
    total, labelled, sums = 0, 0, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.records"
        with RecordWriter(path, seq=13, pad_token=0, vocab_size=999, source="") as writer:
            for number, tokens in enumerate(samples):
                labels = [token if token % 3 else IGNORED for token in tokens]
                own = sum(loss_of(token, place) for place, token in enumerate(tokens) if labels[place] != IGNORED)
                example, choice = divmod(number - plain, 3) if number >= plain else (-1 - number, -1)
                answer = choice == example % 3
                writer.add(tokens, labels, example=example + 100, choice=choice, answer=answer)
                if choice < 0 or answer:
                    total, labelled = total + own, labelled + sum(label != IGNORED for label in labels)
                if choice >= 0:
                    sums.setdefault(example, []).append(own)
        batches, scores = TokenBatches(str(path), 0, packing=packing), RecordScores()
        inputs = [torch.empty(batch, 13, dtype=torch.int64) for _ in range(3)]
        seen, rows = [], 0
        for number in range(batches.evaluation_count(inputs)):
            found = batches.evaluation(number, inputs)
            ids, labels, positions = inputs
            assert int((ids > 0).sum()) == sum(record.length for record in found)
            seen += [record.input_ids.tolist() for record in found]
            rows += len({record.begin // 13 for record in found})
            losses = ((7 * ids + 3 * positions) % 5).where(labels >= 0, 0).float().flatten()
            scores.add(float("nan"), losses, inputs, found)
        batches.close()
    result = scores.result(0.0)
    assert sorted(seen) == sorted(samples)
    assert result["records"] == len(samples)
    assert result["loss"] == total / max(1, labelled)
    right = [own.index(min(own)) == example % 3 for example, own in sums.items()]
    assert result["questions"] == len(right)
    assert result["accuracy"] == (sum(right) / len(right) if right else None)
    assert rows <= len(samples) if packing else rows == len(samples)


def test_an_evaluation_has_few_rows_and_the_last_batch_may_be_short(records):
    """Samples of 1 to 7 tokens, for rows of 12, in about the order of the file."""
    made = list(batches_of_evaluation(records, batch=4))
    assert [len(rows) for rows in made] == [4, 4, 4, 4, 1]
    assert made[0][0][0] == 0
    assert sum(1 + index % 7 for index in range(50)) / (12 * 17) > 0.95
    batches = TokenBatches(str(records.path), 5, packing=True)
    inputs = [torch.full((4, 12), -7) for _ in range(3)]
    assert batches.evaluation_count(inputs) == 5
    found = batches.evaluation(4, inputs)
    assert [record.begin // 12 for record in found] == [0] * len(found)
    ids, labels, positions = inputs
    assert int(ids[1:].sum()) == 0
    assert (labels[1:] == IGNORED).all()
    assert positions[1:].tolist() == [list(range(12))] * 3
    # Training and evaluation of one file do not disturb each other.
    batches.training(0, inputs)
    batches.evaluation(4, inputs)
    assert torch.equal(inputs[0], ids)
    batches.close()
