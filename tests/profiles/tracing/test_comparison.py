"""A module's programs beside PyTorch in several steps: equal ones pass, others are refused, and what is not compared is
said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace as Namespace

import pytest
import torch
from beside_pytorch import compared, traced_of
from torch import Tensor, nn
from torch.nn import functional

from examples.vision import residual_cnn
from tightfit.profiles import api
from tightfit.profiles.schema import NOT_COMPARED
from tightfit.profiles.tracing import comparison
from tightfit.profiles.tracing.comparison import TOLERANCE, GradientComparison, distances, step_bytes
from tightfit.profiles.tracing.eager_steps import EagerResult
from tightfit.profiles.tracing.traced import Trace
from tightfit.runtime.common.errors import InputError

ALIKE = "loss and gradients are PyTorch's in 3 steps of AdamW on different batches, "


class Pair(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(8, 8), nn.Linear(8, 8), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def dropped(module, x):
    hidden = functional.dropout(module.a(x), 0.3)
    return module.b(hidden + torch.randn_like(x)).square().mean()


def doubled_behind_the_trace(module, x):
    """No trace sees a hook on a node of autograd's graph."""
    hidden = module.a(x)
    if hidden.grad_fn is not None:
        hidden.grad_fn.register_prehook(lambda gradients: (2 * gradients[0],))
    return module.b(hidden).square().mean()


@pytest.mark.slow
def test_what_is_drawn_at_random_is_drawn_alike(tmp_path):
    told = compared(Pair(dropped), (torch.randn(16, 8),), tmp_path)
    assert told == f"{ALIKE}exactly"


def test_another_gradient_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"own\.module: the traced step does not compute what PyTorch does .*: the gradient of a\.(weight|bias) differs by 0\.5 times its size \(2 of 5 results differ\)"):  # fmt: skip
        compared(Pair(doubled_behind_the_trace), (torch.randn(16, 8),), tmp_path)


def tilted_behind_the_trace(module, x):
    hidden = module.a(x)
    if hidden.grad_fn is not None:
        hidden.grad_fn.register_prehook(lambda gradients: (1.003 * gradients[0],))
    return module.b(functional.batch_norm(hidden, None, None, training=True)).relu().mean()


@pytest.mark.slow
def test_gradients_may_differ_as_far_as_rounding_moves_them(tmp_path, monkeypatch):
    """No step in double precision is needed, which takes twice the memory of training."""
    torch.manual_seed(0)
    module, x = Pair(tilted_behind_the_trace), torch.randn(16, 8)
    with pytest.raises(InputError, match=r"the gradient of a\.\w+ differs"):
        compared(module, (x,), tmp_path)
    monkeypatch.setattr(comparison, "_in_double_precision", None)
    assert compared(module, (1000 + x / 100,), tmp_path).startswith(ALIKE)


@pytest.mark.slow
def test_another_loss_is_refused(tmp_path):
    def halved(traced: Trace) -> None:
        (mean,) = [op for p in traced.programs for op in p.operators if op.target == "aten.mean.default"]
        mean.args[0]["operand"]["size"] = [8, 8]

    with pytest.raises(InputError, match=r"the loss is \S+ for \S+ \("):
        compared(Pair(lambda m, x: m.b(m.a(x)).square().mean()), (torch.randn(16, 8),), tmp_path, halved)


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_not_compared(tmp_path):
    told = compared(Pair(lambda m, x: m.b(m.a(x)).mean() * math.inf), (torch.randn(16, 8),), tmp_path)
    assert told.startswith(f"{NOT_COMPARED}: its loss on the sample batch is ")


@pytest.mark.slow
def test_what_does_not_fit_is_said(monkeypatch, tmp_path):
    module, batch = residual_cnn()
    beside = GradientComparison("own.module", module, batch, traced_of(module, batch))
    needed = step_bytes(beside.traced.layers, beside.traced.programs, module)
    assert needed > 3 * sum(parameter.nbytes for parameter in module.parameters())
    for free, told in ((2 * needed, None), (2 * needed - 1, f"{NOT_COMPARED}: it takes .* beside what is held")):
        monkeypatch.setattr(comparison, "free_memory", lambda free=free: (free, "what there is"))
        why = beside.why_not(tmp_path)
        assert why is None if told is None else re.match(told, why)
    monkeypatch.setattr(comparison, "free_memory", lambda: (2 * needed, "what there is"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Namespace(free=2**10))
    assert f"of the disk of {tmp_path}, and 1.0 KiB are free" in beside.why_not(tmp_path)


def test_distances_are_parts_of_what_is_due():
    one, other = torch.ones(4), torch.zeros(4)
    due = EagerResult(
        loss=2.0,
        gradients={"w": one, "noise": 1e-9 * one, "b": one},
        statistics={"var": 10 * one, "mean": 1e-6 * one, "count": torch.tensor(2)},
    )
    own = EagerResult(
        loss=2.2,
        gradients={"w": 1.01 * one, "noise": other},
        statistics={"var": 10 * one, "mean": -1e-6 * one, "count": torch.tensor(1)},
    )
    apart = distances(own, due)
    assert apart["loss"] == pytest.approx(0.1)
    assert apart["w"] == pytest.approx(0.01, rel=1e-2)
    assert apart["w"] > TOLERANCE
    assert apart["noise"] == apart["mean"] == apart["var"] == 0  # sums that cancel leave no more
    assert apart["b"] == pytest.approx(1, rel=1e-4)  # missing is nothing
    assert apart["count"] == pytest.approx(0.5, rel=1e-4)
    assert (
        distances(EagerResult(loss=2.0, gradients={"w": one}), EagerResult(loss=2.0, gradients={"w": other}))["w"]
        == math.inf
    )


def behind_the_trace():
    return Pair(doubled_behind_the_trace), (torch.randn(16, 8),)


@pytest.mark.slow
def test_a_profile_is_refused_before_anything_is_timed(cache):
    stages = []
    with pytest.raises(InputError, match="does not compute what PyTorch does"):
        api.profile(f"{__name__}:behind_the_trace", progress=lambda stage, done, total: stages.append((stage, done)))
    assert max(done for stage, done in stages if stage == "measure") == 1  # the one program was watched
    assert [done for stage, done in stages if stage == "compare"] == [0, 1, 2, 3]
    assert not [path for path in cache.iterdir() if path.is_dir() and path.name.startswith("tmp")]
