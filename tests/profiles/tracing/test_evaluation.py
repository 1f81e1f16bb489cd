"""Evaluations of a module beside the module in PyTorch's eval mode: the same, or refused by what differs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from beside_pytorch import beside, traced_of
from torch import Tensor, nn
from torch.nn import functional

Draw = Callable[[Tensor, float, bool], Tensor]


def as_in_timm(x: Tensor, p: float, training: bool) -> Tensor:
    if p == 0.0 or not training:
        return x
    kept = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - p)
    return x * kept.div_(1 - p)


def as_in_torchvision(x: Tensor, p: float, training: bool) -> Tensor:
    if not training:
        return x
    noise = torch.empty((len(x),) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x * noise.bernoulli_(1 - p).div_(1 - p)


def as_in_transformers(x: Tensor, p: float, training: bool) -> Tensor:
    if p == 0.0 or not training:
        return x
    kept = 1 - p + torch.rand((len(x),) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x.div(1 - p) * kept.floor_()


def noisy(x: Tensor, p: float, training: bool) -> Tensor:
    return x + p * torch.randn_like(x) if training else x


def thinned(x: Tensor, p: float, training: bool) -> Tensor:
    """Another way for each mode, not what dropout leaves of it."""
    return functional.alpha_dropout(x, p, training) if training else 0.5 * x.relu()


def sampled(x: Tensor, p: float, training: bool) -> Tensor:
    return functional.gumbel_softmax(x, dim=1) if training else x.softmax(1)


class Block(nn.Module):
    def __init__(self, draw: Draw, p: float) -> None:
        super().__init__()
        self.conv, self.norm, self.draw, self.p = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), draw, p

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(self.norm(self.conv(x)).relu(), self.p, self.training)


class Network(nn.Module):
    """Draws within its blocks, before them, between them or after them (`places`)."""

    def __init__(self, draw: Draw, places: Sequence[str]) -> None:
        super().__init__()
        self.draw, self.places = draw, places
        self.dropout = nn.Dropout(0.2)
        rate = 0.4 if "within" in places else 0.0
        self.blocks = nn.ModuleList(Block(draw if rate else as_in_timm, rate * index / 3) for index in range(4))
        self.head = nn.Linear(8, 3)

    def drawn(self, x: Tensor, place: str) -> Tensor:
        return self.draw(x, 0.3, self.training) if place in self.places else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.drawn(x, "before")
        for block in self.blocks:
            x = self.drawn(self.dropout(block(x)), "between")
        return self.head(self.drawn(x.mean((2, 3)), "after")).square().mean()


def batch() -> tuple[Tensor, ...]:
    return (torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(1)),)


DRAWS = (as_in_timm, as_in_torchvision, as_in_transformers, noisy, thinned, sampled)
PLACES = (["within"], ["before"], ["between"], ["after"], ["within", "before", "between", "after"])


CASES = [
    pytest.param(draw, places, marks=[] if (row + column) % len(PLACES) == 0 else pytest.mark.slow)
    for row, draw in enumerate(DRAWS)
    for column, places in enumerate(PLACES)
]


@pytest.mark.parametrize(("draw", "places"), CASES)
def test_an_evaluation_is_that_of_eval_mode(draw: Draw, places: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    compared = beside(Network(draw, places), batch(), tmp_path, evaluated=True)
    assert compared.other_evaluation is None
    assert len(compared.evaluations) == 3
    phases = [{op.phase for op in program.operators} for program in compared.traced.programs]
    assert any("inference" in found for found in phases)


@pytest.mark.parametrize("draw", [noisy, as_in_timm])
def test_layers_stay_apart(draw: Draw) -> None:
    names = [layer.name for layer in traced_of(Network(draw, ["within"]), batch(), evaluated=True).layers]
    assert names == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]


class Own(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(8, 8), nn.Linear(8, 8), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def head_of_its_own(module: Own, x: Tensor) -> Tensor:
    loss = module.a(x).square().mean()
    return loss + module.b(x).square().mean() if module.training else loss


def no_loss(module: Own, x: Tensor) -> Tensor:
    output = module.b(module.a(x))
    return output.square().mean() if module.training else output


def failing(module: Own, x: Tensor) -> Tensor:
    if not module.training:
        raise RuntimeError("no weights for an evaluation")
    return module.b(module.a(x)).square().mean()


def always_left_out(module: Own, x: Tensor) -> Tensor:
    return functional.dropout(module.b(module.a(x)), 0.4).square().mean()


def always_drawn(module: Own, x: Tensor) -> Tensor:
    x = functional.dropout(x, 0.5)
    return (module.b(module.a(x)) * torch.rand(len(x), 1)).square().mean()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (head_of_its_own, "in eval mode: Own uses other parameters in eval mode than where it is trained"),
        (no_loss, r"in eval mode: forward must return one scalar loss, not a tensor of shape \[16, 8\]"),
        (failing, r"in eval mode: Own fails on the sample batch.*no weights for an evaluation"),
        (always_left_out, r"the loss of the sample is .* in eval mode in PyTorch, and .* here; it draws .*ropout\)"),
        (always_drawn, "it draws at random in eval mode, too"),
    ],
)
def test_what_an_evaluation_cannot_be_is_said(call: Callable[..., Tensor], told: str, tmp_path: Path) -> None:
    compared = beside(Own(call), (torch.randn(16, 8),), tmp_path, evaluated=True)
    assert compared.other_evaluation is not None
    assert re.search(told, compared.other_evaluation, re.DOTALL), compared.other_evaluation


class Averaged(nn.Module):
    """Running statistics that PyTorch's batch normalisation does not keep the same way."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(4, 4, 1), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)).square().sum(1).sqrt().mean()


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4, affine=False), nn.InstanceNorm1d(4), nn.AlphaDropout(0.3), nn.RReLU()]
)
def test_a_norm_of_pytorch_is_evaluated_alike(norm: nn.Module, tmp_path: Path) -> None:
    compared = beside(Averaged(norm), (torch.randn(8, 4, 5),), tmp_path, evaluated=True)
    assert compared.other_evaluation is None


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = Network(noisy, ["within"])
    module.blocks[1].eval()
    modes = [part.training for part in module.modules()]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    beside(module, batch(), tmp_path, evaluated=True)
    assert modes == [part.training for part in module.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
