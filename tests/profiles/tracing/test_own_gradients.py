"""A module's own gradients: custom autograd Functions run as they are, torch.no_grad() holds, hooks are refused by
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from interpreter import run_step
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tightfit.profiles.tracing.trace import trace
from tightfit.profiles.tracing.traced import Trace
from tightfit.runtime.common.errors import InputError


class Scaled(torch.autograd.Function):
    """Two results, one of them a view of the input, and a gradient that is not their derivative."""

    @staticmethod
    def forward(ctx, x, factor, unused=None):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.view_as(x), x.sin(), factor

    @staticmethod
    def backward(ctx, first, second, _):
        (x,) = ctx.saved_tensors
        return ctx.factor * first + 3 * x.cos() * second, None, None


class Step(torch.autograd.Function):
    """A straight-through estimator, in the form with a context of its own."""

    @staticmethod
    def forward(x):
        return (x > 0).float()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Factor(torch.autograd.Function):
    """With a default, which the context gets too."""

    @staticmethod
    def forward(x, factor=2.0):
        return x * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.factor + 1), None


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.factor * gradient, None


class Expanded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.expand(4, *x.shape)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.sum(0)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module):
        return x @ module.a.weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


step = Step.apply  # taken off the class before anything is traced
factor = Factor.apply


class Pair(nn.Module):
    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(8, 8), nn.Linear(8, 8), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x)


def scaled(module, x):
    kept, made, factor = Scaled.apply(module.a(x), 7)
    return module.b(kept + factor * made).square().mean()


def straight_through(module, x):
    return (module.b(step(module.a(x))) + Reversed.apply(module.a(x), 0.3)).square().mean()


def with_defaults(module, x):
    return (module.b(factor(module.a(x))) + factor(module.a(x), 5.0) + Factor.apply(module.b(x), 3.0)).square().mean()


def by_name(module, x):
    return module.b(factor(module.a(x), factor=3.0)).square().mean()


def in_no_grad(module, x):
    with torch.no_grad():
        held = factor(module.a(x)) * Factor.apply(module.a(x), 4.0)
    return (held * module.b(x)).square().mean()


def expanded(module, x):
    return module.b(Expanded.apply(module.a(x))).square().mean()


def of_the_loss(module, x):
    return Reversed.apply(module.b(module.a(x)).square().mean(), 2.0)


def without_gradient(module, x):
    with torch.no_grad():
        held = module.a(x)
        with torch.enable_grad():
            open_again = module.b(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        narrow = module.a(x)
    return module.b(held + module.a(x) * open_again + narrow).square().mean()


def without_gradient_of_a_weight(module, x):
    with torch.no_grad():
        target = module.a.weight.clone()
    return functional.linear(module.b(x), target * module.a.weight).square().mean()


def checkpointed(module, x):
    return module.b(checkpoint(lambda y: module.a(y).tanh(), module.b(x), use_reentrant=True)).square().mean()


def made_of(module: nn.Module, traced: Trace, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    return run_step(traced.layers, {p.name: p for p in traced.programs}, held | batch)


@pytest.mark.parametrize(
    "call",
    [
        scaled,
        straight_through,
        with_defaults,
        by_name,
        in_no_grad,
        expanded,
        of_the_loss,
        without_gradient,
        without_gradient_of_a_weight,
        checkpointed,
    ],
)
def test_gradients_are_those_of_autograd(call):
    torch.manual_seed(0)
    module, batch = Pair(call), {"x": torch.randn(16, 8)}
    made = made_of(module, traced := trace(module, batch), batch)
    loss = module(**batch)
    loss.backward()
    torch.testing.assert_close(made[traced.loss], loss.detach())
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            assert f"grad:{name}" not in made
        else:
            torch.testing.assert_close(made[f"grad:{name}"], parameter.grad)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = Reversed.apply(step(block(x)), 0.5)
        return x.square().mean()


def test_equal_layers_with_a_custom_function_share_a_program():
    traced = trace(Deep(), {"x": torch.randn(16, 8)})
    blocks = [layer.program for layer in traced.layers if layer.name.startswith("blocks.")]
    assert len(blocks) == 5
    assert len(set(blocks)) <= 3  # the first needs no gradient for its input, the last makes the loss


def hooked(module, x):
    hidden = module.a(x)
    hidden.register_hook(lambda gradient: 2 * gradient)
    return module.b(hidden).square().mean()


@pytest.mark.slow_but_for("<lambda>-the autograd Function Doubled changes its input in place", "hooked-told2")
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, x: m.b(Doubled.apply(m.a(x) * 1)).mean(), "the autograd Function Doubled changes its input in place"),
        (
            lambda m, x: Reading.apply(m.b(x), m).mean(),
            rf"Pair cannot be traced at {re.escape(__file__)}:\d+ \(`return x @ module\.a\.weight`\): it uses a tensor that it was not given",
        ),
        (hooked, rf"^at {re.escape(__file__)}:\d+ a tensor of shape \[16, 8\] has a hook on its gradient \(register_hook of {re.escape(__file__)}:\d+\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_as_it_is_is_refused_by_name(call, told):
    with pytest.raises(InputError, match=told):
        trace(Pair(call), {"x": torch.randn(16, 8)})


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        (lambda m: m.a.weight.register_hook(torch.zeros_like), r"parameter a\.weight has a hook on its gradient \(register_hook of "),
        (
            lambda m: m.b.bias.register_post_accumulate_grad_hook(lambda p: p.grad.zero_()),
            r"parameter b\.bias has a hook on its gradient \(register_post_accumulate_grad_hook of .*test_own_gradients\.py:\d+\)",
        ),
        (lambda m: m.a.register_full_backward_hook(lambda *_: None), r"module a has a hook on its gradient \(register_full_backward_hook of "),
        (lambda m: m.register_full_backward_pre_hook(lambda *_: None), r"module Pair has a hook on its gradient \(register_full_backward_pre_hook of "),
    ],
)  # fmt: skip
def test_hooks_are_refused_by_name(hook, told):
    module = Pair(lambda m, x: m.b(m.a(x)).mean())
    hook(module)
    with pytest.raises(InputError, match=told):
        trace(module, {"x": torch.randn(16, 8)})


library = torch.library.Library("tightfit_test", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")


class Looking(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8, sparse=True), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding((x > 0).long())).mean()


def penalised(module, x):
    x = x.requires_grad_()
    made = module.a(x).tanh()
    (slope,) = torch.autograd.grad(made.sum(), x, create_graph=True)
    return module.b(made).mean() + (slope.norm(2, 1) - 1).square().mean()


def missing(module, x):
    return module.a(x) * {}["scale"]


@pytest.mark.slow_but_for(
    "module1-at .*test_own_gradients\\\\.py:\\\\d+ forward computes a gradient \\\\(torch\\\\.func\\\\)",
    "module0-told0",
    "module9-told9",
    "module5-told5",
)
@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Pair(penalised), r"at .*test_own_gradients\.py:\d+ forward computes a gradient \(torch\.autograd\.grad\), which is not supported"),
        (Pair(lambda m, x: m.a(x).mean() + torch.func.grad(lambda x: m.b(x).tanh().sum())(x).norm()), r"at .*test_own_gradients\.py:\d+ forward computes a gradient \(torch\.func\)"),
        (Pair(missing), r"Pair fails on the sample batch; correct its forward\nTraceback .*\n(.*\n)*.*, in missing\n(.*\n)*KeyError: 'scale'$"),
        (Pair(lambda m, x: m.a(x).view(3)), r"Pair fails on the sample batch; .*\n(.*\n)*RuntimeError: shape '\[3\]' is invalid"),
        (Pair(lambda m, x: m.a(x)[(x > 0).nonzero()[:, 0]].mean()), r"Pair cannot be traced at .*test_own_gradients\.py:\d+ \(`.*\): what follows depends on the values of tensors \(aten\.nonzero"),
        (Pair(lambda m, x: m.a(x).mean() * x.sum().item()), r"Pair cannot be traced at .*test_own_gradients\.py:\d+ \(`.*\): what follows depends on the values of tensors"),
        (Pair(lambda m, x: m.a(x).mean() if x.sum() > 0 else m.b(x).mean()), r"Pair cannot be traced by torch\.export at .*test_own_gradients\.py:\d+ \(`.*\): what follows depends on the values"),
        (Pair(lambda m, x: torch.ops.tightfit_test.twice(m.a(x)).mean()), r"Pair cannot be traced at .*test_own_gradients\.py:\d+ \(`.*\): operator tightfit_test\.twice\.default is not one of PyTorch"),
        (Pair(lambda m, x: (m.a(x) * torch.tensor([1.0] * 8)).mean()), r"Pair cannot be traced at .*test_own_gradients\.py:\d+ \(`.*\): forward makes a tensor of shape \[8\]"),
        (Looking(), r"Looking cannot be traced at .*test_own_gradients\.py:\d+ \(`return self\.head.*\): aten\.\S+ makes a sparse_coo tensor"),
    ],
)  # fmt: skip
def test_what_cannot_be_traced_is_named_with_its_line(module, told, capfd):
    with pytest.raises(InputError, match=told):
        trace(module, {"x": torch.randn(16, 8)})
    assert capfd.readouterr() == ("", "")
