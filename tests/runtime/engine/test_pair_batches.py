"""Batches of pairs of answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.runtime.engine.training.pairs import DPO, PairBatches
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


@given(lengths=LENGTHS, batch=st.integers(1, 5), steps=st.one_of(st.none(), st.integers(1, 60)))
def test_references_are_asked_for_once_for_each_pair_that_is_seen(folder, lengths, batch, steps):
    batches = PairBatches(written(folder, lengths), 4, DPO)
    found = [pair for one in batches.of_references(steps, batch) for pair in one]
    if steps is None:
        seen = set(range(len(lengths)))
    else:
        seen = {pair for step in range(steps) for pair in batches.of_step(step, batch)}
    assert len(found) == len(set(found))
    assert set(found) == seen
    assert all(len(one) <= batch for one in batches.of_references(steps, batch))
    batches.close()
