"""Adafactor's updates of one trainable against torch.optim.Adafactor: matrices, vectors, kernels of convolutions, pairs
of factors; several gradients to an update, clipped ones; the same bits whatever the number of threads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tightfit.runtime.engine.kernels.adafactor import COLUMNS, WINDOW
from tightfit.runtime.engine.kernels.optimizer import FACTORED, Adafactor, ClippedUpdate, GradientUpdate, state_shape

STEPS, LR = 6, 1e-2
SHAPES = {
    "scalar": (),
    "vector": (5,),
    "vector of several windows": (WINDOW + 77,),
    "matrix": (3, 4),
    "one row": (1, 40),
    "matrix of several windows": (300, 500),
    "matrix that is too wide for a window": (5, 2 * COLUMNS + 9),
    "matrix of a wide row": (1, WINDOW + 5),
    "matrix of a narrow column": (WINDOW + 5, 1),
    "pair's first factor": (8, 576),
    "pair's second factor": (1536, 8),
    "kernels": (7, 5, 3, 3),
    "kernels of several windows": (96, 64, 3, 3),
    "kernels of one element": (64, 200, 1, 1),
    "matrices that are larger than a window": (2, 300, 400),
}
SETTINGS: dict[str, dict[str, float]] = {
    "defaults": {},
    "decay": {"weight_decay": 0.1},
    "all": {"weight_decay": 0.01, "beta2_decay": -0.5, "eps": 1e-2, "eps2": 0.5, "clip_threshold": 1.5},
}


def theirs(parameter: torch.Tensor, settings: dict[str, float], lr: float = LR) -> torch.optim.Optimizer:
    own = {name: settings[name] for name in ("weight_decay", "beta2_decay") if name in settings}
    eps = (settings.get("eps"), settings.get("eps2", 1e-3))
    return torch.optim.Adafactor([parameter], lr=lr, eps=eps, d=settings.get("clip_threshold", 1.0), **own)  # type: ignore[arg-type]


def gradients(shape: tuple[int, ...], seed: int = 0) -> Iterator[torch.Tensor]:
    """Gradients that grow and shrink, with rows and columns of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, STEPS + 1):
        made = torch.randn(shape, generator=generator) * 10.0 ** (3 - number)
        for dim in range(len(shape)):
            size = [1] * len(shape)
            size[dim] = shape[dim]
            made *= torch.rand(size, generator=generator) + 0.01
        yield made


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_those_of_torch(shape: str, settings: str) -> None:
    size, given = SHAPES[shape], SETTINGS[settings]
    torch.manual_seed(1)
    value = torch.randn(size) * 0.3
    reference = torch.nn.Parameter(value.clone())
    optimizer = theirs(reference, given)
    update = GradientUpdate(Adafactor(lr=LR, **given))
    state = torch.zeros(state_shape(FACTORED, size))
    for number, gradient in enumerate(gradients(size), 1):
        reference.grad = gradient.clone()
        optimizer.step()
        update.begin(number)
        kept = gradient.clone()
        update.apply(number, value, gradient, state)
        assert torch.equal(gradient, kept)
    torch.testing.assert_close(value, reference.detach(), rtol=2e-6, atol=1e-7)
    held = optimizer.state[reference]
    names = ("variance",) if len(size) < 2 else ("row_var", "col_var")
    torch.testing.assert_close(state, torch.cat([held[name].flatten() for name in names]), rtol=1e-5, atol=0.0)


def test_defaults_are_those_of_torch() -> None:
    """The learning rate's is that of all optimizers here; PyTorch finds its first eps by the parameter's type."""
    said = {name: one.default for name, one in inspect.signature(torch.optim.Adafactor).parameters.items()}
    ours = Adafactor()
    assert (ours.beta2_decay, ours.clip_threshold, ours.weight_decay) == (
        said["beta2_decay"], said["d"], said["weight_decay"],
    )  # fmt: skip
    assert said["eps"] == (None, ours.eps2)
    assert ours.eps == torch.finfo(torch.float32).eps


def test_the_learning_rate_is_bounded_by_the_updates_number() -> None:
    """A rate above 1 / sqrt(number) is cut down to that; a schedule's rate is that of the step."""
    value = torch.randn(20, 30)
    reference = torch.nn.Parameter(value.clone())
    optimizer = theirs(reference, {})
    ours = Adafactor(lr=3.0, schedule="linear", warmup_steps=2, total_steps=STEPS)
    update = GradientUpdate(ours)
    state = torch.zeros(50)
    for number, gradient in enumerate(gradients((20, 30)), 1):
        optimizer.param_groups[0]["lr"] = ours.rate(number)
        reference.grad = gradient.clone()
        optimizer.step()
        update.begin(number)
        update.apply(number, value, gradient, state)
    torch.testing.assert_close(value, reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (9,), (6, 5, 3, 3)])
@pytest.mark.parametrize("limit", [None, 0.5, 1e6])
def test_sums_of_gradients_and_clipped_ones(shape: tuple[int, ...], limit: float | None) -> None:
    """Two gradients to an update, scaled down together to a norm as by PyTorch."""
    torch.manual_seed(2)
    value = torch.randn(shape)
    reference = torch.nn.Parameter(value.clone())
    optimizer = theirs(reference, {})
    ours = Adafactor(lr=LR)
    update = GradientUpdate(ours, 2) if limit is None else ClippedUpdate(ours, limit, 2)
    state, total = torch.zeros(state_shape(FACTORED, shape)), torch.zeros(shape)
    made = list(gradients(shape))
    for step, gradient in enumerate(made, 1):
        update.begin(step, 3.0 if step % 2 else 1.0)
        if isinstance(update, ClippedUpdate):
            update.add(gradient, total)
            if update.due:
                update.norm()
                update.apply_sum(step, value, state, total)
        else:
            update.apply(step, value, gradient, state, total)
        if step % 2 == 0:
            reference.grad = (3.0 * made[step - 2] + gradient) / 4.0
            if limit is not None:
                torch.nn.utils.clip_grad_norm_([reference], limit)
            optimizer.step()
    torch.testing.assert_close(value, reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", [0.0, math.inf, math.nan])
def test_gradients_of_nothing_or_of_no_number_do_as_in_torch(what: float) -> None:
    value = torch.randn(4, 6)
    reference = torch.nn.Parameter(value.clone())
    reference.grad = torch.full((4, 6), what)
    theirs(reference, {}).step()
    update = GradientUpdate(Adafactor(lr=LR))
    update.begin(1)
    update.apply(1, value, reference.grad, torch.zeros(10))
    assert torch.equal(torch.isnan(value), torch.isnan(reference.detach()))
    torch.testing.assert_close(value, reference.detach(), equal_nan=True)


@pytest.mark.parametrize("shape", ["vector of several windows", "matrix of a wide row", "kernels of several windows"])
def test_the_number_of_threads_changes_no_bit(shape: str) -> None:
    size = SHAPES[shape]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(3)
            value, state = torch.randn(size), torch.zeros(state_shape(FACTORED, size))
            update = GradientUpdate(Adafactor(lr=LR, weight_decay=0.1))
            for number, gradient in enumerate(gradients(size), 1):
                update.begin(number)
                update.apply(number, value, gradient, state)
            results.append((value, state))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_a_tensor_of_no_elements_has_no_update() -> None:
    for size in ((0,), (0, 4), (4, 0)):
        arguments: Any = torch.zeros(size), torch.zeros(size), torch.zeros(state_shape(FACTORED, size))
        update = GradientUpdate(Adafactor())
        update.begin(1)
        update.apply(1, *arguments)
