"""Batches of pairs of answers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tightfit.runtime.engine.training.pairs import DPO, ORPO, PairBatches, pairs_in
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


@pytest.mark.parametrize("packing", [False, True])
@given(lengths=LENGTHS, batch=st.integers(1, 5), steps=st.one_of(st.none(), st.integers(1, 60)))
def test_references_are_asked_for_once_for_each_pair_that_is_seen(folder, packing, lengths, batch, steps):
    batches = PairBatches(written(folder, lengths), 4, DPO, packing=packing)
    found = [pair for rows in batches.of_references(steps, batch) for pair in pairs_in(rows)]
    if steps is None:
        seen = set(range(len(lengths)))
    else:
        seen = {pair for step in range(steps) for pair in batches.of_step(step, batch)}
    assert len(found) == len(set(found))
    assert set(found) == seen
    assert all(len(rows) <= 2 * batch for rows in batches.of_references(steps, batch))
    batches.close()


@pytest.mark.parametrize("loss", [DPO, ORPO])
@given(lengths=LENGTHS, batch=st.integers(1, 3))
def test_both_answers_of_a_pair_are_packed_into_one_batch(folder, loss, lengths, batch):
    """Each place says whose answer it is; the batches of an epoch have each pair once."""
    batches = PairBatches(written(folder, lengths), 2, loss, packing=True)
    planes = 2 if loss == DPO else 1
    inputs = [*(torch.full((2 * batch, SEQ), -7) for _ in range(3)), torch.empty(planes, 2 * batch, SEQ).double()]
    steps, seen = int(batches.epoch_steps(batch)), []
    for step in range(steps):
        pairs = batches.of_step(step, batch)
        tokens = batches.training(step, inputs)
        seen += pairs
        input_ids, labels, positions, (numbers, *_) = inputs
        assert batches.samples == len(pairs)
        assert tokens == int((input_ids > 0).sum()) == sum(sum(lengths[pair]) for pair in pairs)
        for number, pair in enumerate(pairs):
            for side in (0, 1):
                held = input_ids == 2 * pair + side + 1
                assert int(held.sum()) == lengths[pair][side]
                assert positions[held].tolist() == list(range(lengths[pair][side]))
                answer = held & (positions >= 1)  # the first token of each answer is its prompt
                assert (numbers[answer] == 2 * number + side).all()
                likely = loss == ORPO and side == 0
                assert ((labels[held & (positions == 0)] >= 0) == likely).all()
        assert (numbers[(input_ids == 0) | (positions == 0)] == -1).all()
    assert sorted(seen) == list(range(len(lengths)))
    # An evaluation packs pairs in their own order, an epoch in a drawn one: of 30,000 drawn epochs 3 of 24 was the most.
    assert batches.evaluation_count(inputs) <= min(2 * steps, steps + 2 + steps // 8)
    batches.close()
