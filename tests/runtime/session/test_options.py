"""The options of a run: what is refused, and what follows once the length of an epoch is known."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.session.admission import check_fleet_options
from tightfit.runtime.session.options import TrainingOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "epochs": 1.0}, "steps=3 and epochs=1.0: give one of them"),
        ({"epochs": 0}, "epochs 0: it should be greater than 0"),
        ({"epochs": "2"}, "epochs '2': it should be a valid number"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps=5 and warmup_ratio=0.1: give one of them"),
        ({"warmup_ratio": 1.5}, "warmup_ratio 1.5: it should be less than or equal to 1"),
        ({"min_lr_ratio": -0.1, "schedule": "linear"}, "min_lr_ratio -0.1: it should be greater than or equal to 0"),
        ({"beta1": 1.5}, "beta1 1.5: it should be less than 1"),
        ({"beta2": 1}, "beta2 1: it should be less than 1"),
        ({"eps": -1.0}, "eps -1.0: it should be greater than or equal to 0"),
        ({"eps2": -1.0}, "eps2 -1.0: it should be greater than or equal to 0"),
        ({"beta2_decay": 0.5}, "beta2_decay 0.5: it should be less than or equal to 0"),
        ({"beta2_decay": float("-inf")}, "beta2_decay -inf: it should be a finite number"),
        ({"clip_threshold": 0.5}, "clip_threshold 0.5: it should be greater than or equal to 1"),
        ({"clip_threshold": "1"}, "clip_threshold '1': it should be a valid number"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio 0.1: the constant schedule does not fall; choose linear or cosine"),
        (
            {"eval_every": "often"},
            "eval_every 'often': give a number of steps, at least 1, or of epochs as in '0.5 epochs'",
        ),
        ({"eval_every": "0 epochs"}, "eval_every '0 epochs': give a number of steps"),
        ({"eval_every": 0}, "eval_every 0: it should be greater than or equal to 1"),
        ({"eval_every": "0"}, "eval_every '0': give a number of steps, at least 1"),
        ({"keep_best": True}, "keep_best: there is one evaluation, after the last step; give eval_every"),
        ({"early_stopping": 2}, "early_stopping: there is one evaluation, after the last step; give eval_every"),
        ({"early_stopping": 0, "eval_every": 2}, "early_stopping 0: it should be greater than or equal to 1"),
        ({"lr": None}, "lr None: it should be a valid number"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainingOptions(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2, "eval_every": "1 epoch"}, "eval_every 1 epoch: the members of a fleet evaluate before and after"),
        ({"epochs": 2, "eval_every": 3, "keep_best": True}, "eval_every 3: the members of a fleet"),
    ],
)
def test_what_a_fleet_cannot_do_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_fleet_options(TrainingOptions(**options))
    assert str(caught.value).startswith(message)
    check_fleet_options(TrainingOptions(steps=2, warmup_ratio=0.5, schedule="cosine", min_lr_ratio=0.1))


@given(
    records=st.integers(1, 300),
    batch=st.integers(1, 16),
    hundredths=st.integers(1, 500),
    of_update=st.integers(1, 6),
)
def test_epochs_are_enough_steps_and_no_update_more(records: int, batch: int, hundredths: int, of_update: int) -> None:
    """Counted in whole records: all of them are seen, and with one update less they would not be."""
    steps = TrainingOptions(epochs=hundredths / 100).over(records / batch, of_update=of_update).steps
    assert steps is not None
    assert steps % of_update == 0
    due = Fraction(hundredths, 100) * records
    assert steps * batch >= due
    assert (steps - of_update) * batch < due


@pytest.mark.parametrize(
    ("asked", "every"), [(7, 7), ("7", 7), ("1 epoch", 12), ("0.5 epochs", 6), (".25epochs", 3), ("0.001 epochs", 1)]
)
def test_an_interval_is_in_steps_or_epochs(asked: int | str, every: int) -> None:
    assert TrainingOptions(steps=40, eval_every=asked).over(12.4, of_update=1).eval_every == every


def test_a_ratio_of_warm_up_is_rounded_as_transformers_rounds_it() -> None:
    theirs = pytest.importorskip("transformers").TrainingArguments.get_warmup_steps
    for steps in range(1, 400, 7):
        for ratio in (0.0, 0.03, 0.1, 0.999):
            options = TrainingOptions(steps=steps, warmup_ratio=ratio).over(None, of_update=1)
            # It calls a share what is below 1.
            assert options.warmup_steps == theirs(SimpleNamespace(warmup_steps=ratio), steps)
            assert options.warmup_ratio is None
