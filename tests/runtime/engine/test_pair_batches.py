"""Batches of pairs of answers of like lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tightfit.runtime.engine.training.pairs import DPO, ORPO, PairBatches
from tightfit.runtime.engine.training.records import IGNORED, RecordWriter

SEQ = 12
LENGTHS = st.lists(st.tuples(st.integers(2, SEQ), st.integers(2, SEQ)), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


def written(folder, lengths):
    """Pairs whose two answers have these lengths; those of pair i have the tokens 2 i + 1 and 2 i + 2."""
    path = folder / "x.records"
    with RecordWriter(path, seq=SEQ, pad_token=0, vocab_size=999, source="", pairs=True) as writer:
        for pair, both in enumerate(lengths):
            for choice, length in enumerate(both):
                tokens = [2 * pair + choice + 1] * length
                writer.add(tokens, [IGNORED, *tokens[1:]], example=pair, choice=choice, answer=choice == 0)
    return str(path)


def longest_of(lengths, pairs):
    return max(max(lengths[pair]) for pair in pairs)


@given(lengths=LENGTHS, batch=st.integers(1, 5), seed=st.integers(0, 9))
def test_the_longest_answer_of_a_batch_is_known_before_it_is_made(folder, lengths, batch, seed):
    batches = PairBatches(written(folder, lengths), seed, DPO, by_length=True)
    steps = -(-len(lengths) // batch)
    assert batches.epoch_steps(batch) == steps
    for epoch in range(2):
        found = [batches.of_step(epoch * steps + number, batch) for number in range(steps)]
        assert sorted(pair for one in found for pair in one) == list(range(len(lengths)))
        for number, pairs in enumerate(found):
            assert batches.longest(epoch * steps + number, 2 * batch) == longest_of(lengths, pairs)
    found = [batches.of_evaluation(number, batch) for number in range(steps)]
    assert sorted(pair for one in found for pair in one) == list(range(len(lengths)))
    for number, pairs in enumerate(found):
        assert batches.longest_in_evaluation(number, 2 * batch) == longest_of(lengths, pairs)
    # Windows of an evaluation are sorted: none of these pairs is longer than one of the next batch.
    tops = [max(max(lengths[pair]) for pair in one) for one in found]
    assert tops == sorted(tops, reverse=True)
    assert batches.longest_of([]) == 0
    batches.close()


@pytest.mark.parametrize("by_length", [False, True])
@given(lengths=LENGTHS, batch=st.integers(1, 5), steps=st.one_of(st.none(), st.integers(1, 60)))
def test_references_are_asked_for_once_for_each_pair_that_is_seen(folder, by_length, lengths, batch, steps):
    batches = PairBatches(written(folder, lengths), 4, DPO, by_length=by_length)
    found = [pair for one in batches.of_references(steps, batch) for pair in one]
    if steps is None:
        seen = set(range(len(lengths)))
    else:
        seen = {pair for step in range(steps) for pair in batches.of_step(step, batch)}
    assert len(found) == len(set(found))
    assert set(found) == seen
    assert all(len(one) <= batch for one in batches.of_references(steps, batch))
    batches.close()


@pytest.mark.parametrize("loss", [DPO, ORPO])
def test_a_batch_is_the_same_in_rows_of_its_own_length(folder, loss):
    lengths = [(3 + pair % 7, 2 + pair * 3 % 8) for pair in range(23)]
    batches = PairBatches(written(folder, lengths), 1, loss, by_length=True)
    kind = torch.float64 if loss == DPO else torch.int64

    def inputs(length):
        return [*(torch.full((8, length), -7) for _ in range(2)), torch.full((8,), -7, dtype=kind)]

    for ask, longest in ((batches.training, batches.longest), (batches.evaluation, batches.longest_in_evaluation)):
        shorter = 0
        for number in range(6):
            most = longest(number, 8)
            shorter += most < SEQ
            whole, short = inputs(SEQ), inputs(most)
            ask(number, whole)
            ask(number, short)
            for full, own, padding in zip(whole[:2], short[:2], (0, IGNORED), strict=True):
                assert torch.equal(full[:, :most], own)
                assert (full[:, most:] == padding).all()
            assert torch.equal(whole[2], short[2])
            if loss == ORPO:
                held = (whole[0] > 0).any(1)
                assert (whole[2] == held.long()).all()  # the first token of each answer is its prompt
        assert shorter
    with pytest.raises(ValueError, match=r"record \d+, of \d+ positions, does not fit a batch of shape \[8, \d+\]"):
        batches.evaluation(5, inputs(longest(5, 8) - 1))
    batches.close()
