"""Batches of samples of like lengths: each sample once in an epoch or an evaluation, with little padding, the same for every process."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.runtime.engine.training import by_length
from tightfit.runtime.engine.training.by_length import WINDOW_SAMPLES, WINDOWS_IN_EPOCH, SortedBatches
from tightfit.runtime.engine.training.records import shuffled

SAMPLES = st.lists(st.integers(1, 300), min_size=1, max_size=300)
BATCH = st.integers(1, 40)


def made(lengths, batch):
    return SortedBatches(len(lengths), batch, lengths.__getitem__)


def epoch_of(batches, seed, epoch=0):
    return [batches.of_step(epoch * batches.in_epoch + number, seed) for number in range(batches.in_epoch)]


def evaluation_of(batches):
    return [batches.of_evaluation(number) for number in range(batches.in_epoch)]


def flat(batches):
    return [sample for batch in batches for sample in batch]


def padded(lengths, batches):
    """Places of the rows that hold no token, where each batch is as long as its longest sample."""
    return sum(max(lengths[one] for one in batch) - lengths[one] for batch in batches for one in batch)


def least_padding(lengths, batch):
    """The fewest padded places with which samples of these lengths can be shared out to whole batches: tries all ways."""
    if not lengths:
        return 0
    first, *rest = lengths
    best = math.inf
    for others in itertools.combinations(range(len(rest)), batch - 1):
        own = [first, *(rest[place] for place in others)]
        left = [length for place, length in enumerate(rest) if place not in others]
        best = min(best, max(own) * batch - sum(own) + least_padding(left, batch))
    return best


@settings(max_examples=150)
@given(lengths=SAMPLES, batch=BATCH, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_each_sample_comes_once_and_only_the_last_batch_is_incomplete(lengths, batch, seed, epoch):
    batches = made(lengths, batch)
    for found in (epoch_of(batches, seed, epoch), evaluation_of(batches)):
        assert len(found) == math.ceil(len(lengths) / batch)
        assert sorted(flat(found)) == list(range(len(lengths)))
        assert [len(one) for one in found[:-1]] == [batch] * (len(found) - 1)
        assert len(found[-1]) == (len(lengths) - 1) % batch + 1


@pytest.mark.parametrize(
    ("count", "batch"),
    [(1, 1), (1, 7), (3, 1000), (7, 7), (8, 7), (5, 2), (1025, 2), (4097, 3), (5000, 1024), (5000, 1500), (2048, 8)],
)
def test_sizes_at_the_edges(count, batch):
    """A batch that holds all samples, one sample too many, windows of one batch and of batches larger than a window."""
    lengths = [1 + number * 7919 % 211 for number in range(count)]
    batches = made(lengths, batch)
    for epoch in range(2):
        found = epoch_of(batches, 5, epoch)
        assert sorted(flat(found)) == list(range(count))
        assert all(len(one) == batch for one in found[:-1])
    found = evaluation_of(batches)
    assert sorted(flat(found)) == list(range(count))
    assert all(len(one) == batch for one in found[:-1])


@settings(max_examples=60)
@given(batch=st.integers(1, 4), data=st.data())
def test_a_window_has_the_least_padding_that_whole_batches_allow(batch, data):
    """An evaluation of few samples is one window; those that fill no batch are its shortest."""
    count = data.draw(st.integers(1, 8 // batch)) * batch
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count + batch - 1))
    found = evaluation_of(made(lengths, batch))
    whole, rest = found[: count // batch], flat(found[count // batch :])
    ordered = sorted(lengths, reverse=True)
    assert [lengths[one] for one in rest] == ordered[count:]
    assert padded(lengths, whole) == least_padding(ordered[:count], batch)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 50), min_size=36, max_size=36), seed=st.integers(0, 9), epoch=st.integers(0, 2))
def test_each_window_of_an_epoch_has_the_least_padding(lengths, seed, epoch):
    """With batches of 3, four windows have three batches each."""
    found = epoch_of(made(lengths, 3), seed, epoch)
    order = [shuffled(place, 36, seed, epoch) for place in range(36)]
    for window in range(WINDOWS_IN_EPOCH):
        own, due = found[3 * window : 3 * window + 3], order[9 * window : 9 * window + 9]
        assert sorted(flat(own)) == sorted(due)
        assert padded(lengths, own) == least_padding([lengths[one] for one in due], 3)


def test_rows_have_far_less_padding_than_those_of_an_unsorted_order():
    spread = random.Random(0)
    lengths = [spread.randint(8, 512) for _ in range(6000)]
    batches = made(lengths, 8)
    unsorted = [[shuffled(8 * number + row, 6000, 3, 0) for row in range(8)] for number in range(750)]
    assert padded(lengths, epoch_of(batches, 3)) < 0.03 * padded(lengths, unsorted)
    in_order = [list(range(8 * number, 8 * number + 8)) for number in range(750)]
    assert padded(lengths, evaluation_of(batches)) < 0.03 * padded(lengths, in_order)


def test_few_samples_have_less_padding_too():
    spread = random.Random(1)
    lengths = [spread.randint(8, 512) for _ in range(64)]
    batches = made(lengths, 4)
    unsorted = sum(
        padded(lengths, [[shuffled(4 * number + row, 64, 3, epoch) for row in range(4)] for number in range(16)])
        for epoch in range(10)
    )
    assert sum(padded(lengths, epoch_of(batches, 3, epoch)) for epoch in range(10)) < 0.5 * unsorted


def test_epochs_differ_in_the_order_and_in_who_shares_a_batch():
    lengths = [1 + number % 37 for number in range(400)]
    batches = made(lengths, 4)
    epochs = [epoch_of(batches, 0, epoch) for epoch in range(4)]
    for number, one in enumerate(epochs):
        for other in epochs[:number]:
            assert one != other
            assert {frozenset(batch) for batch in one} != {frozenset(batch) for batch in other}


def test_each_window_of_each_epoch_has_an_order_of_its_own():
    """By which of its batches has the longest samples, the second longest and so on."""
    lengths = list(range(1, 401))
    batches = made(lengths, 4)
    orders = set()
    for epoch in range(3):
        found = epoch_of(batches, 0, epoch)
        for begin in range(0, 100, 25):
            longest = [max(lengths[one] for one in batch) for batch in found[begin : begin + 25]]
            orders.add(tuple(sorted(range(25), key=longest.__getitem__)))
    assert len(orders) == 3 * WINDOWS_IN_EPOCH


def test_the_batches_of_a_window_come_in_no_order_of_length():
    """Else a model would see the short samples of each window first."""
    lengths = [1 + number % 97 for number in range(4000)]
    longest = [max(lengths[one] for one in batch) for batch in epoch_of(made(lengths, 4), 0)]
    rising = sum(after >= before for before, after in itertools.pairwise(longest))
    assert 0.4 < rising / (len(longest) - 1) < 0.6


def test_another_seed_has_another_order():
    lengths = [1 + number % 37 for number in range(100)]
    orders = {tuple(flat(epoch_of(made(lengths, 4), seed))) for seed in range(5)}
    assert len(orders) == 5


@settings(max_examples=60)
@given(lengths=SAMPLES, batch=BATCH, seed=st.integers(0, 9), steps=st.lists(st.integers(0, 2000), max_size=6))
def test_a_step_has_the_same_batch_whatever_was_asked_for_before(lengths, batch, seed, steps):
    asked = made(lengths, batch)
    for step in steps:
        assert asked.of_step(step, seed) == made(lengths, batch).of_step(step, seed)
        number = step % asked.in_epoch
        assert asked.of_evaluation(number) == made(lengths, batch).of_evaluation(number)
        assert asked.of_step(step, seed) == made(lengths, batch).of_step(step, seed)


@pytest.mark.parametrize("batch", [1, 3, 8, 1000])
def test_no_more_samples_are_looked_at_than_a_window_has(batch, monkeypatch):
    """Of data of any size: what a step needs, in the epoch's order and in lengths that are read."""
    placed, measured = [], []

    def place_of(place, count, seed, epoch):
        if count > WINDOW_SAMPLES:  # the order of batches within a window is no sample
            placed.append(place)
        return shuffled(place, count, seed, epoch)

    def length(sample):
        measured.append(sample)
        return 1 + sample % 100

    monkeypatch.setattr(by_length, "shuffled", place_of)
    batches = SortedBatches(10_000_000, batch, length)
    for step in (0, 123_456 % batches.in_epoch, batches.in_epoch - 2):
        for ask in (lambda step: batches.of_step(step, 0), batches.of_evaluation):
            placed.clear()
            measured.clear()
            assert len(ask(step)) == batch
            assert batch <= len(measured) <= WINDOW_SAMPLES == 1024
            assert len(placed) <= WINDOW_SAMPLES
            held = [sample for made_ in batches._latest[1] for sample in made_]
            assert sorted(held) == sorted(measured)
    # The steps of a window are made once.
    batches = SortedBatches(10_000_000, batch, length)
    measured.clear()
    for step in range(1024 // batch):
        batches.of_step(step, 0)
    assert len(measured) == 1024 // batch * batch
