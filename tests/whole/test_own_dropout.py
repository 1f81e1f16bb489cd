"""A module's own dropout: the step is PyTorch's with the same masks, which are the same at every budget; evaluations
leave nothing out; about as many elements are left out as asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import make_training
from tiny_plans import module_profile, naive_plan
from torch import Tensor, nn
from torch.nn import functional as F

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.schema import Profile
from tightfit.profiles.sources.factory import build_module
from tightfit.profiles.tracing.own_dropout import _replaced, dropout_off
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.device.draws import Draws
from tightfit.runtime.engine.training.batches import write_batches
from tightfit.runtime.engine.training.trainer import Training
from tightfit.runtime.session.python_batches import as_planned

LR, STEPS, SEED = 1e-3, 4, 7


class Encoder(nn.Module):
    """Dropout of elements, in place, of channels, of attention weights, and some that leaves nothing out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.25, batch_first=True) for _ in range(3)
        )
        self.channels, self.head = nn.Dropout1d(0.5), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        x = F.dropout(self.channels(x) + 1, 0.3, inplace=True)
        return F.dropout(F.dropout(self.head(x), 0.5, training=False), 0.0)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 16, generator=generator), torch.randn(4, 6, 1, generator=generator)


def encoder() -> Any:
    return Encoder(), batch(0), lambda made, wanted: (made - wanted).square().mean()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return module_profile(tmp_path_factory.mktemp("store"), f"{__name__}:encoder")


@pytest.fixture(scope="module")
def data(made: Profile, tmp_path_factory: pytest.TempPathFactory) -> str:
    plan = naive_plan(made)
    path = tmp_path_factory.mktemp("data") / "data"
    return write_batches(str(path), [as_planned(plan, batch(seed), "it") for seed in range(STEPS)])


def in_eager(made: Profile) -> tuple[list[float], float, dict[str, Tensor]]:
    """(losses, loss on all batches after them, parameters) of a loop of PyTorch's, with the masks of a run's
    operators.
    """
    programs = {program.name: program for program in made.programs}
    placed = [
        (layer.name, operator.args[2])
        for layer in made.layers
        for operator in programs[layer.program].operators
        if operator.target == "tightfit.dropout" and operator.phase == "forward"
    ]
    assert len(placed) == 3 * 4 + 2
    draws = Draws(SEED)
    order: Iterator[tuple[str, int]] = iter(())

    def masked(x: Tensor, p: float) -> Tensor:
        draws.layer, site = next(order)
        mask = torch.empty(x.numel() // x.shape[-1], x.shape[-1])
        OPERATORS["tightfit.dropout"](torch.ones_like(mask), p, site, out=(mask,), draws=draws)
        assert abs(float((mask == 0).float().mean()) - p) < 0.35
        return x * mask.view(x.shape)

    def channels(x: Tensor, p: float) -> Tensor:
        return x * masked(torch.ones(x.shape[:2]), p)[..., None]

    module, _, _ = build_module(f"{__name__}:encoder")
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        draws.step, order = step + 1, iter(placed)
        with _replaced(masked, channels):
            loss = module(*batch(step))
        assert next(order, None) is None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad(), dropout_off():
        after = sum(module(*batch(step)).item() for step in range(STEPS)) / STEPS
    return losses, after, {name: parameter.detach() for name, parameter in module.named_parameters()}


def opened(plan: Plan, data: str, folder: Path, seed: int = SEED) -> Training:
    folder.mkdir(exist_ok=True)
    # The process of a test holds more than a training process.
    training = make_training(plan.model_copy(update={"budget_bytes": 1 << 33}), data, folder, lr=LR, seed=seed)
    training.initialise()
    return training


def values(training: Training) -> dict[str, Tensor]:
    return {one.name: training.storage.value(number).clone() for number, one in enumerate(training.trainables)}


@pytest.mark.slow
def test_every_plan_is_pytorch_s_loop_with_the_same_masks(made: Profile, data: str, tmp_path: Path) -> None:
    expected, after, parameters = in_eager(made)
    assert not any("aten.bernoulli" in op.target for program in made.programs for op in program.operators)
    planner = ModelPlanner(made)
    smallest = planner.plan(planner.minimum().peak_bytes)
    plans = [naive_plan(made), naive_plan(made, recompute=True), smallest]
    plans += [planner.plan(1 << 33, policy=rule) for rule in ("checkpoint-layers", "checkpoint-sqrt")]
    found = []
    for number, plan in enumerate(plans):
        training = opened(plan, data, tmp_path / str(number))
        losses = [training.step(step) for step in range(1, STEPS + 1)]
        found.append((losses, training.evaluate(data, lambda *_: None)["loss"], values(training)))
        training.close()
    assert found[0][0] == pytest.approx(expected, rel=1e-4)
    assert found[0][1] == pytest.approx(after, rel=1e-4)
    for name, value in parameters.items():
        # The bias of the keys has no gradient but rounding errors, which AdamW makes large.
        kept = slice(32, None) if name.endswith("in_proj_bias") else slice(None)
        torch.testing.assert_close(found[0][2][name][kept], value[kept], rtol=1e-3, atol=2e-4)
    for losses, evaluated, trained in found[1:]:
        assert (losses, evaluated) == found[0][:2]
        assert all(torch.equal(trained[name], value) for name, value in found[0][2].items())
    assert simulate(smallest).peak_bytes == smallest.peak_bytes
    dropouts = {
        (layer.name, position)
        for layer in made.layers
        for program in made.programs
        if program.name == layer.program
        for position, operator in enumerate(program.operators)
        if operator.target == "tightfit.dropout" and operator.phase == "forward"
    }
    ran = [(one.layer, one.operator) for one in plans[3].steps[0].instructions if getattr(one, "verb", "") == "run"]
    assert any(ran.count(one) > 1 for one in dropouts)  # no mask is kept: a forward that runs again draws it again


@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "added", "scaled", "shared heads"])
def test_attention_with_dropout_is_attention_where_nothing_is_left_out(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    options: dict[str, Any] = {}
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "mask":
        options["attn_mask"] = torch.rand(5, 7) < 0.8
    elif kind == "added":
        options["attn_mask"] = torch.randn(5, 7)
    elif kind == "scaled":
        options["scale"] = 0.7
    elif kind == "shared heads":
        k, v, options["enable_gqa"] = k[:, :2], v[:, :2], True
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with dropout_off():
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, **options)
    torch.testing.assert_close(found, expected)


def test_all_may_be_left_out() -> None:
    with dropout_off():
        assert not F.dropout(torch.ones(3), 1.0).any()
        x = torch.ones(3)
        assert F.dropout(x, 0.5, inplace=True) is x
        assert F.dropout(x, 0.5, training=False) is x
