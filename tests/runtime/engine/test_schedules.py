"""Learning rates at every step of a run, beside those of transformers."""

from __future__ import annotations

import pytest
import torch

from tightfit.runtime.engine.kernels.optimizer import AdamW

LR = 3e-4


def of_transformers(schedule: str, steps: int, warmup: int, floor: float) -> list[float]:
    """The rate of each step, and of one more."""
    transformers = pytest.importorskip("transformers")
    name = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}[schedule]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    options = {}
    if floor:
        name, options = "cosine_with_min_lr", {"scheduler_specific_kwargs": {"min_lr_rate": floor}}
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, **options
    )
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("steps", "warmup"), [(40, 0), (40, 7), (9, 1), (6, 5)])
@pytest.mark.parametrize(
    ("schedule", "floor"), [("constant", 0.0), ("linear", 0.0), ("cosine", 0.0), ("cosine", 0.1), ("cosine", 1.0)]
)
def test_every_step_has_the_rate_that_transformers_gives_it(
    schedule: str, floor: float, steps: int, warmup: int
) -> None:
    """In the warm-up the rate that it gives to the next one: its first step has the rate 0, and trains nothing."""
    theirs = of_transformers(schedule, steps, warmup, floor)
    mine = AdamW(lr=LR, schedule=schedule, warmup_steps=warmup, total_steps=steps, min_lr_ratio=floor)
    for step in range(1, steps + 1):
        assert mine.rate(step) == pytest.approx(theirs[step if step <= warmup else step - 1], rel=1e-12)


def test_a_linear_schedule_falls_to_its_floor() -> None:
    mine = AdamW(lr=1.0, schedule="linear", total_steps=10, min_lr_ratio=0.2)
    assert [mine.rate(step) for step in range(1, 12)] == pytest.approx([1 - 0.08 * step for step in range(11)])


def test_updates_of_several_steps_have_the_rates_of_as_many_updates() -> None:
    theirs = of_transformers("cosine", 10, 2, 0.0)
    mine = AdamW(lr=LR, schedule="cosine", warmup_steps=8, total_steps=40)
    assert [mine.rate(4 * update, 4) for update in range(3, 11)] == pytest.approx(theirs[2:10], rel=1e-12)
