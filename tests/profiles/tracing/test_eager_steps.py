"""Modules with a state, or with random numbers of others: each is refused by name or computes what it does in
PyTorch.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from beside_pytorch import compared
from stateful_modules import AS_PYTORCH, COUNT, KINDS, Keeping, annealed, attribute, refused, stateful
from torch import nn

from tightfit.profiles import api
from tightfit.profiles.sources.factory import build_with_batches
from tightfit.profiles.steps import module_step
from tightfit.profiles.tracing.comparison import GradientComparison
from tightfit.profiles.tracing.eager_steps import EagerSteps, StepError, eager_step
from tightfit.runtime.common.errors import InputError


@pytest.mark.slow_but_for(
    "a hidden state carried from batch to batch",
    "a weight clamped in place under `no_grad`",
    "a queue of keys, a buffer (MoCo)",
    "`torch.manual_seed` in forward",
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_refused_by_name_or_kept(kind, tmp_path):
    module, batch = stateful(kind)
    words = KINDS[kind][2]
    if not refused(words):
        assert words in compared(module, batch, tmp_path)
        return
    with pytest.raises(InputError) as raised:
        compared(module, batch, tmp_path)
    assert words in str(raised.value)
    assert "register" not in str(raised.value).replace("draw them in __init__ and register", "")


@pytest.mark.slow
def test_a_real_constant_is_told_from_what_changes(tmp_path):
    values = np.linspace(0, 1, 8, dtype=np.float32)
    constant = Keeping(lambda m, x: m.loss(m.a(x) * torch.tensor(values)), attribute())
    with pytest.raises(InputError, match=r"forward makes a tensor of shape \[8\] .* register it as a buffer"):
        compared(constant, (torch.randn(16, 8),), tmp_path)
    COUNT["calls"] = 0

    def changing(module, x):
        COUNT["calls"] += 1
        return module.loss(module.a(x) * torch.tensor(values * COUNT["calls"]))

    with pytest.raises(InputError, match="the same step gives other results when it is taken again"):
        compared(Keeping(changing, attribute()), (torch.randn(16, 8),), tmp_path)


@pytest.mark.slow
def test_a_module_has_its_values_and_attributes_again():
    module, batch = stateful("running statistics of batch normalisation")
    module.step = 0
    module.call = lambda m, x: m.loss(m.norm(m.a(x)) + 0 * setattr_step(m))
    before, drawn = {name: value.clone() for name, value in module.state_dict().items()}, torch.get_rng_state()
    assert EagerSteps("own.module", module, batch, ignored=("step",)).take() == 3
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.step == 0
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


def setattr_step(module) -> int:
    module.step += 1
    return module.step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "told"), [(lambda m, x: m.loss(m.a(x)), None), (annealed, "its forward changes step in step 2")]
)
def test_a_module_that_cannot_be_copied_takes_the_steps_itself(call, told, tmp_path):
    module = Keeping(call, attribute(step=0, lock=threading.Lock()))
    batch = (torch.randn(16, 8),)
    if told is None:
        assert "; the module cannot be copied" in compared(module, batch, tmp_path)
        return
    with pytest.raises(InputError, match=told):
        compared(module, batch, tmp_path)


def taken(module, sample, others=()):
    batches = []
    steps = EagerSteps("own.module", module, sample, others)
    steps.take(lambda number, batch, given, made: batches.append(batch))
    return steps.batches, batches


@pytest.mark.slow
def test_steps_are_taken_on_batches_like_the_sample():
    torch.manual_seed(0)
    sample = torch.randn(6, 8), torch.tensor([5, 5, 9, 9, 7, 7]), torch.tensor([0.0, 1, 1, 0, 1, 1]), torch.zeros(())
    said, batches = taken(Keeping(lambda m, x: m.loss(m.a(x)), attribute()), sample[:1])
    assert said == "different batches"
    assert all(torch.equal(a, b) for a, b in zip(batches[0], sample, strict=False))
    module = Keeping(lambda m, x: m.loss(m.a(x)), attribute())
    module.forward = lambda x, y, z, w: module.loss(module.a(x)) * y.float().mean() + w
    said, batches = taken(module, sample)
    assert said == "different batches"
    for x, labels, mask, scalar in batches[1:]:
        assert not torch.equal(x, sample[0])
        order = [int((row - sample[0]).norm(dim=1).argmin()) for row in x]
        torch.testing.assert_close(x, sample[0][order], rtol=0.11, atol=1e-6)
        assert sorted(order) == list(range(6)) != order
        assert set(labels.tolist()) <= {5, 7, 9}
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert scalar == 0
    assert not torch.equal(batches[1][0], batches[2][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (lambda x: bool((x.sum() - 30.0).abs() < 1e-4), "the sample's rows in other orders"),
        (lambda x: bool((x.diff(dim=0) > 0).all()), "the sample batch"),
    ],
)
def test_a_module_that_takes_no_other_values_is_given_what_it_takes(needs, said):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1)

        def forward(self, x):
            assert needs(x)
            return self.a(x).square().mean()

    sample = (torch.arange(8.0).view(8, 1) + 0.25,)
    assert taken(Picky(), sample)[0] == said
    with pytest.raises(StepError, match="Picky fails on the sample batch; correct its forward"):
        taken(Picky(), (torch.zeros(8, 1),))


@pytest.mark.slow
def test_a_step_that_only_the_first_time_works_is_shown(tmp_path):
    def undetached(module, x):
        hidden = module.a(x) if module.hidden is None else module.a(x) + module.hidden
        module.hidden = hidden
        return module.loss(hidden)

    with pytest.raises(
        InputError, match=r"own\.module: forward fails in step 2, on the batch that it took in step 1; .*\nTraceback"
    ):
        compared(Keeping(undetached, attribute(hidden=None)), (torch.randn(16, 8),), tmp_path)


@pytest.mark.slow
def test_gradients_of_what_a_copy_captured_are_the_module_s(tmp_path):
    """A closure of the module reads its parameters in a copy too."""
    module, batch = stateful("weight norm")
    inner = module.a
    module.call = lambda m, x: m.loss(inner(x))
    assert compared(module, batch, tmp_path) == AS_PYTORCH


@pytest.mark.slow
def test_a_step_without_gradients_is_a_forward():
    module, batch = stateful("dropout, `torch.rand`")
    assert eager_step(module, batch, gradients=False).gradients == {}
    assert eager_step(module, batch, gradients=False).loss == eager_step(module, batch).loss


def loaded():
    data = torch.utils.data.TensorDataset(torch.arange(20.0).view(10, 2), torch.arange(10))
    return nn.Linear(2, 10), torch.utils.data.DataLoader(data, batch_size=4), nn.CrossEntropyLoss()


def iterated():
    return stateful("weight norm")[0], (stateful("weight norm")[1] for _ in range(9))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "labels"), [(loaded, [list(range(4)), list(range(4, 8))]), (iterated, None)], ids=["loader", "iterator"]
)
def test_a_factory_may_give_several_batches(factory, labels):
    module, batches, inputs = build_with_batches(f"{__name__}:{factory.__name__}")
    assert inputs == (1 if labels else None)
    assert len(batches) == (2 if labels else 3)  # the last one of the loader has other shapes
    if labels:
        assert [batch[1].tolist() for batch in batches] == labels
    said, taken_on = taken(module, batches[0], batches[1:])
    assert said == "different batches"
    assert all(map(torch.equal, taken_on[1], batches[1]))
    assert len(taken_on) == 3


@pytest.mark.slow
def test_a_profile_compares_on_what_the_factory_gives(cache, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module_step, "GradientComparison", lambda *given: seen.append(given) or GradientComparison(*given)
    )
    measured = api.profile(f"{__name__}:loaded", force=True)
    assert measured.model.compared.startswith(
        "loss and gradients are PyTorch's in 3 steps of AdamW on different batches, "
    )
    assert [other[1].tolist() for other in seen[0][4]] == [list(range(4, 8))]
