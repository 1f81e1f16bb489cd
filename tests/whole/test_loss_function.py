"""A loss outside the module, `loss_fn(module(*inputs), *targets)`: trained as by PyTorch's own loop, and what is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import make_training
from safetensors.torch import load_file
from tiny_plans import module_profile, naive_plan
from torch import Tensor, nn
from torch.nn import functional as F

from tightfit.planner.schema import Plan
from tightfit.profiles.sources.factory import build_module
from tightfit.profiles.tracing.eager_steps import eager_step
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.batches import write_batches
from tightfit.runtime.session.python_batches import as_planned

LR, STEPS = 1e-2, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits: Tensor = self.head(x)
        return logits


class Masked(Net):
    """Two inputs, and a pair as output."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x * mask), x.square().mean()


class WithCriterion(Net):
    """Its loss has a parameter, which is a part of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = Scaled()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, made: Tensor, target: Tensor) -> Tensor:
        return (self.scale * made - target).square().mean()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def weighted() -> Any:
    return Net(), batch(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)


def both(made: tuple[Tensor, Tensor], labels: Tensor, weights: Tensor) -> Tensor:
    logits, norm = made
    return (F.cross_entropy(logits, labels, reduction="none") * weights).mean() + 0.1 * norm


def two_inputs(seed: int = 0) -> Any:
    x, labels = batch(seed)
    return (
        Masked(),
        ((x, (x > 0).float()), (labels, torch.rand(8, generator=torch.Generator().manual_seed(seed)))),
        both,
    )


def within() -> Any:
    module = WithCriterion()
    x, _ = batch()
    return module, (x, x[:, :3].clone()), module.criterion


def without_targets() -> Any:
    return Net(), (batch()[0], ()), lambda made: made.square().mean()


def flat(given: Any) -> tuple[list[Tensor], list[Tensor]]:
    inputs, targets = ([part] if isinstance(part, Tensor) else list(part) for part in given)
    return inputs, targets


@pytest.mark.parametrize("factory", [weighted, two_inputs, within, without_targets])
def test_it_trains_as_a_loop_of_pytorch_s(factory: Callable[[], Any], tmp_path: Path) -> None:
    plan = planned(factory, tmp_path)
    torch.manual_seed(0)
    module, first, loss_fn = factory()
    second = two_inputs(1)[1] if factory is two_inputs else first
    batches = [first, second, first, second]
    expected = []
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    initial = set(module.state_dict())
    for one in batches:
        inputs, targets = flat(one)
        loss = loss_fn(module(*inputs), *targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    data = write_batches(str(tmp_path / "data"), [as_planned(plan, one, "it") for one in batches])
    training = make_training(plan, data, tmp_path, lr=LR)
    training.header["state_dict"] = plan.model.config["state_dict"]
    training.initialise()
    assert [training.step(number) for number in range(1, STEPS + 1)] == pytest.approx(expected, rel=1e-5)
    training.save_trained(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == initial
    for name, value in module.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-5)
    training.close()


def planned(factory: Callable[[], Any], folder: Path) -> Plan:
    return naive_plan(module_profile(folder, f"{__name__}:{factory.__name__}"))


def test_hooks_see_the_module_s_own_inputs_and_output() -> None:
    module, sample, inputs = build_module(f"{__name__}:weighted")
    seen: list[list[int]] = []
    module.register_forward_hook(lambda _, given, made: seen.extend(list(t.shape) for t in (*given, made)))
    loss = module(*sample)
    assert inputs == 1
    assert seen == [[8, 6], [8, 3]]
    again = copy.deepcopy(module).double()  # as the comparison with PyTorch does
    assert again(sample[0].double(), sample[1]).item() == pytest.approx(loss.item(), rel=1e-5)
    assert eager_step(module, sample).loss == loss.item()


def test_a_batch_has_inputs_and_targets(tmp_path: Path) -> None:
    plan = planned(two_inputs, tmp_path)
    given = two_inputs()[1]
    assert [t.shape[0] for t in as_planned(plan, given, "it")] == [8, 8, 8, 8]
    (x, mask), (labels, weights) = given
    for wrong, message in (
        ((x, mask, labels, weights), r"it has 4 items; where there is a loss_fn it has two, inputs and targets"),
        (((x,), (mask, labels, weights)), r"it has 1 inputs, the module takes 2; give \(inputs, targets\)"),
        (((x, mask), (labels,)), "it has tensors .* the plan was made for"),
        (((x, 1.0), (labels, weights)), "it: item 1 is of type float; a batch is a tuple of tensors"),
    ):
        with pytest.raises(InputError, match=message):
            as_planned(plan, wrong, "it")


def other_rows() -> Any:
    return Net(), (batch()[0], batch()[1][:7]), F.cross_entropy


def unreduced() -> Any:
    return Net(), batch(), nn.CrossEntropyLoss(reduction="none")


def own_parameters() -> Any:
    x, _ = batch()
    return Net(), (x, x[:, :3]), Scaled()


def three_parts() -> Any:
    x, labels = batch()
    return Net(), (x, labels, labels), F.cross_entropy


def no_function() -> Any:
    return Net(), batch(), "mse"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            other_rows,
            r"(?s)Net fails on the sample batch; correct its loss_fn.*batch_size \(7\)\.\n.*module's output, float32 \[8, 3\], and int64 \[7\]",
        ),
        (unreduced, r"loss_fn must return one scalar loss, not a tensor of shape \[8\]; take its mean or sum"),
        (own_parameters, r"loss_fn has parameters of its own \(scale\).*make it a part of the module"),
        (three_parts, "the sample batch has 3 items; where there is a loss_fn it has two, inputs and targets"),
        (no_function, r"loss_fn is of type str; give a function or a module such as nn\.MSELoss\(\)"),
    ],
)
def test_what_is_no_loss_is_refused(factory: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        planned(factory, tmp_path)
