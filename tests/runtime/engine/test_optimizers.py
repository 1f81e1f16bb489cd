"""Updates of one trainable against torch.optim, or for Lion against the published formula in float64."""

from __future__ import annotations

import pytest
import torch

from tightfit.runtime.engine.kernels.optimizer import (
    LION_ELEMENTS,
    OPTIMIZERS,
    ClippedUpdate,
    GradientUpdate,
    MeZO,
    optimizer_of,
)

LR, DECAY, STEPS = 3e-3, 0.1, 6
STATES = {"adamw": 2, "adam": 2, "sgd": 0, "momentum": 1, "lion": 1, "adafactor": 1}
SIZE = LION_ELEMENTS + 77
"""more than one piece"""


class LionInFull(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675, in float64."""

    def __init__(self, parameters: list[torch.Tensor], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": LR, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                update = (0.9 * mean + 0.1 * parameter.grad).sign()
                parameter.sub_(group["lr"] * (update + group["weight_decay"] * parameter))
                self.state[parameter]["mean"] = 0.99 * mean + 0.01 * parameter.grad


REFERENCES = {
    "adamw": lambda parameters, decay: torch.optim.AdamW(parameters, lr=LR, weight_decay=decay),
    "adam": lambda parameters, decay: torch.optim.Adam(parameters, lr=LR, weight_decay=decay),
    "sgd": lambda parameters, decay: torch.optim.SGD(parameters, lr=LR, weight_decay=decay),
    "momentum": lambda parameters, decay: torch.optim.SGD(parameters, lr=LR, weight_decay=decay, momentum=0.9),
    "lion": LionInFull,
    # In float32 its eps is another than in float64.
    "adafactor": lambda parameters, decay: torch.optim.Adafactor(
        parameters, lr=LR, weight_decay=decay, eps=(torch.finfo(torch.float32).eps, 1e-3)
    ),
}


def test_every_optimizer_is_compared() -> None:
    assert REFERENCES.keys() == STATES.keys() == {name for name, kind in OPTIMIZERS.items() if kind is not MeZO}


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("name", STATES)
def test_updates_are_those_of_the_reference(name: str, decay: float) -> None:
    torch.manual_seed(0)
    value = torch.randn(SIZE)
    theirs = torch.nn.Parameter(value.double())
    reference = REFERENCES[name]([theirs], decay)
    update = GradientUpdate(optimizer_of({"name": name, "lr": LR, "weight_decay": decay}))  # type: ignore[arg-type]
    states = [torch.zeros(SIZE) for _ in range(STATES[name])]
    for number in range(1, STEPS + 1):
        gradient = torch.randn(SIZE)
        theirs.grad = gradient.double()
        reference.step()
        update.begin(number)
        update.apply(number, value, gradient.clone(), *states)
    torch.testing.assert_close(value.double(), theirs.detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", STATES)
def test_sums_of_several_gradients_and_clipped_ones_update_alike(name: str) -> None:
    """Three gradients that make an update are the same as their mean; a limit above their norm changes no bit."""
    torch.manual_seed(1)
    start = torch.randn(500)
    gradients = [torch.randn(500) for _ in range(3)]
    settings = {"name": name, "lr": LR}
    updates = GradientUpdate(optimizer_of(settings), 3), ClippedUpdate(optimizer_of(settings), 1e6, 3)  # type: ignore[arg-type]
    made = []
    for update in updates:
        value, *states = (start.clone(), *(torch.zeros(500) for _ in range(STATES[name] + 1)))
        for step, gradient in enumerate(gradients, 1):
            update.begin(step)
            if isinstance(update, ClippedUpdate):
                update.add(gradient, states[-1])
            else:
                update.apply(step, value, gradient, *states)
        if isinstance(update, ClippedUpdate):
            assert update.norm() == pytest.approx(float(torch.stack(gradients).mean(0).norm()), rel=1e-6)
            update.apply_sum(3, value, *states)
        made.append(value)
    alone = start.clone()
    single = GradientUpdate(optimizer_of(settings))  # type: ignore[arg-type]
    single.begin(1)
    single.apply(1, alone, torch.stack(gradients).mean(0), *(torch.zeros(500) for _ in range(STATES[name])))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], start)
    torch.testing.assert_close(made[0], alone, rtol=1e-5, atol=1e-6)
