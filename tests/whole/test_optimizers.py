"""Runs with optimizers other than AdamW and Adafactor: against torch.optim, or for Lion its published formula, at two
budgets, across an interruption.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from wide_regression import FACTORY, regression

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.problem.optimizers import chosen
from tightfit.profiles.api import profile
from tightfit.profiles.schema import OPTIMIZER_STATES, Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.session.launch import run

STEPS, LR = 6, 1e-3
Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def measured() -> Profile:
    return profile(FACTORY)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    torch.manual_seed(5)
    return [(torch.randn(4, 256), torch.randn(4, 256)) for _ in range(STEPS)]


@torch.no_grad()
def lion(parameters: list[torch.Tensor], means: list[torch.Tensor], betas: tuple[float, float] = (0.9, 0.99)) -> None:
    """Algorithm 2 of arXiv 2302.06675, without weight decay."""
    for parameter, mean in zip(parameters, means, strict=True):
        assert parameter.grad is not None
        parameter.sub_(LR * (betas[0] * mean + (1 - betas[0]) * parameter.grad).sign())
        mean.copy_(betas[1] * mean + (1 - betas[1]) * parameter.grad)


def reference(name: str, module: torch.nn.Module) -> Callable[[], Any]:
    parameters: list[torch.Tensor] = list(module.parameters())
    if name == "lion":
        means = [torch.zeros_like(one) for one in parameters]
        return lambda: lion(parameters, means)
    kinds = {
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "momentum": torch.optim.SGD,
    }
    more = {"momentum": 0.9} if name == "momentum" else {}
    return kinds[name](parameters, lr=LR, **more).step  # type: ignore[no-any-return,operator]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "sgd", "momentum", "lion"])
def test_runs_at_two_budgets_give_what_torch_does(
    name: str, measured: Profile, batches: list[Batch], tmp_path: Path
) -> None:
    """The smaller budget has all states on disk."""
    planner = ModelPlanner(chosen(measured, name, None))
    small, roomy = planner.plan(planner.minimum().peak_bytes), planner.plan(1 << 40)
    assert small.optimizer["name"] == name
    for role in OPTIMIZER_STATES[name]:
        assert "offloaded" in {place for one, place in small.decisions.items() if one.startswith(f"{role}:")}
    whole = run(roomy, batches, steps=STEPS, out=tmp_path / "roomy", lr=LR)
    parts = run(small, batches, steps=STEPS, out=tmp_path / "small", lr=LR)
    assert parts["peak_bytes"]["measured"] <= small.peak_bytes
    assert parts["loss"] == whole["loss"]
    files = [tmp_path / one / "checkpoint-6" for one in ("roomy", "small")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (files[0] / file).read_bytes() == (files[1] / file).read_bytes()
    states = {key.partition(":")[0] for key in load_file(files[0] / "optimizer.safetensors")}
    assert states == set(OPTIMIZER_STATES[name])

    module, _ = regression()
    update = reference(name, module)
    losses = []
    for batch in batches:
        module.zero_grad()
        loss = module(*batch)
        loss.backward()
        losses.append(float(loss.detach()))
        update()
    assert whole["loss"] == pytest.approx(losses, rel=1e-4)
    for key, value in load_file(files[0] / "model.safetensors").items():
        # Where a gradient is all but zero, its sign and Adam's quotient are of any size.
        apart = (value - module.state_dict()[key]).abs() > LR / 20
        assert float(apart.float().mean()) < 2e-3, key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3}),
        ("lion", {"beta2": 0.5}),
        ("momentum", {"momentum": 0.5}),
        ("adafactor", {"beta2_decay": -0.5, "eps": 1e-4, "eps2": 0.5, "clip_threshold": 1.5}),
    ],
)
def test_settings_of_an_optimizer_are_those_of_torch(
    name: str, settings: dict[str, float], measured: Profile, batches: list[Batch], tmp_path: Path
) -> None:
    made = plan(measured, 1 << 40, optimizer=name)
    found = run(made, batches, steps=STEPS, out=tmp_path / "out", lr=LR, **settings)
    module, _ = regression()
    parameters = list(module.parameters())
    means = [torch.zeros_like(one) for one in parameters]
    update: dict[str, Callable[[], Any]] = {
        "adamw": torch.optim.AdamW(parameters, lr=LR, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0).step,
        "lion": lambda: lion(parameters, means, (0.9, 0.5)),
        "momentum": torch.optim.SGD(parameters, lr=LR, momentum=0.5).step,
        "adafactor": torch.optim.Adafactor(parameters, lr=LR, beta2_decay=-0.5, eps=(1e-4, 0.5), d=1.5).step,
    }
    for batch in batches:
        module.zero_grad()
        module(*batch).backward()
        update[name]()
    for key, value in load_file(tmp_path / "out" / "model" / "model.safetensors").items():
        apart = (value - module.state_dict()[key]).abs() > LR / 20
        assert float(apart.float().mean()) < 2e-3, key
    again = run(made, batches, steps=STEPS, out=tmp_path / "again", lr=LR)
    assert again["loss"][0] == found["loss"][0]
    assert again["loss"][2:] != found["loss"][2:]


def test_settings_that_an_optimizer_does_not_have_are_refused(llama_of_one: Profile, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"beta2 0\.9: the plan's optimizer, momentum, has none"):
        run(plan(llama_of_one, 1 << 40, optimizer="momentum"), "random", steps=1, out=tmp_path / "out", beta2=0.9)
    with pytest.raises(InputError, match=r"momentum 0\.9: the plan's optimizer, sgd, has none"):
        run(plan(llama_of_one, 1 << 40, optimizer="sgd"), "random", steps=1, out=tmp_path / "out", momentum=0.9)
    made = plan(llama_of_one, 1 << 40, optimizer="adafactor")
    for name in ("beta1", "beta2", "momentum"):
        given: dict[str, Any] = {name: 0.9}
        with pytest.raises(InputError, match=rf"{name} 0\.9: the plan's optimizer, adafactor, has none; leave it out"):
            run(made, "random", steps=1, out=tmp_path / "out", **given)
    for name, value in {"beta2_decay": -0.5, "eps2": 0.5, "clip_threshold": 2.0}.items():
        given = {name: value}
        with pytest.raises(InputError, match=rf"{name} {value:g}: the plan's optimizer, adamw, has none"):
            run(plan(llama_of_one, 1 << 40), "random", steps=1, out=tmp_path / "out", **given)


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_optimizer_alone(measured: Profile, batches: list[Batch], tmp_path: Path) -> None:
    several = batches * 2
    whole = run(plan(measured, 1 << 40, optimizer="lion"), several, steps=4, out=tmp_path / "whole", lr=LR)
    stopped = plan(measured, 1 << 40, optimizer="lion")
    run(stopped, several, steps=2, out=tmp_path / "parts", lr=LR)
    with pytest.raises(InputError, match="was made with another optimizer: name 'lion', now 'momentum'"):
        run(plan(measured, 1 << 40, optimizer="momentum"), several, steps=4, out=tmp_path / "parts", lr=LR, resume=True)
    parts = run(stopped, several, steps=4, out=tmp_path / "parts", lr=LR, resume=True)
    assert parts["loss"] == whole["loss"]
    ends = [tmp_path / one / "model" / "model.safetensors" for one in ("whole", "parts")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
