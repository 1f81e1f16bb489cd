"""Which evaluation is the best, when one is due, and when they end a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.runtime.engine.training.evaluations import STATE, Evaluations

HEADER = {"eval_every": 4, "steps": 12, "early_stopping": 2}
LOSSES = st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, float("nan")]), min_size=1, max_size=8)


def of(header: dict[str, Any] = HEADER, state: dict[str, Any] | None = None, data: str | None = "a") -> Evaluations:
    made = Evaluations.of(header, data, state or {})
    assert made is not None
    return made


def result(loss: float, accuracy: float | None = None) -> dict[str, Any]:
    return {"loss": loss, "accuracy": accuracy, "seconds": 1.0}


def test_they_are_due_at_every_interval_and_after_the_last_step() -> None:
    made = of()
    due = []
    for step in range(1, 13):
        if made.due(step):
            due.append(step)
            made.add(step, result(1.0))
            assert not made.due(step)
    assert due == [4, 8, 12]
    assert [step for step in range(1, 11) if of(HEADER | {"steps": 10}).due(step)] == [4, 8, 10]
    assert Evaluations.of(HEADER | {"eval_every": None}, "a", {}) is None
    assert Evaluations.of(HEADER, None, {}) is None


@given(losses=LOSSES, questions=st.booleans())
def test_the_best_is_the_first_of_the_lowest_loss_and_the_wait_counts_from_it(
    losses: list[float], questions: bool
) -> None:
    """With questions all of one accuracy the loss decides; what is not a number is never the best."""
    made = of()
    for number, loss in enumerate(losses, 1):
        made.add(number, result(loss, 0.5 if questions else None))
    numbers = [loss for loss in losses if not math.isnan(loss)]
    if not numbers:
        assert made.best is None
        assert made.since_best == len(losses)
    else:
        first = losses.index(min(numbers))
        assert made.best == {"step": first + 1, "loss": losses[first], "accuracy": 0.5 if questions else None}
        assert made.since_best == len(losses) - 1 - first
    assert made.over == (made.since_best >= 2)


def test_of_questions_the_accuracy_decides() -> None:
    made = of()
    assert made.add(4, result(1.0, 0.5))
    assert not made.add(8, result(0.1, 0.4))
    assert made.add(10, result(9.0, 0.6))


@given(losses=LOSSES, cut=st.integers(0, 8))
def test_a_run_that_goes_on_knows_what_was(losses: list[float], cut: int) -> None:
    whole, first = of(), of()
    for number, loss in enumerate(losses, 1):
        whole.add(number, result(loss))
        if number <= cut:
            first.add(number, result(loss))
    second = of(state={STATE: first.state()})
    for number, loss in enumerate(losses[cut:], cut + 1):
        second.add(number, result(loss))
    assert repr(second) == repr(whole)  # nan is unequal to itself


def test_what_was_found_on_other_data_says_nothing() -> None:
    first = of()
    first.add(4, result(1.0))
    assert of(state={STATE: first.state()}, data="b") == of(data="b")


@pytest.mark.parametrize(("patience", "over"), [(None, False), (3, False), (2, True), (1, True)])
def test_the_patience_is_that_of_the_run_that_goes_on(patience: int | None, over: bool) -> None:
    first = of()
    for step in (4, 8, 10):
        first.add(step, result(1.0))
    assert of(HEADER | {"early_stopping": patience}, {STATE: first.state()}).over == over
    # After its last step a run is done in any case, and has not ended early.
    assert not of(HEADER | {"early_stopping": patience, "steps": 10}, {STATE: first.state()}).over
