"""BatchNorm in training: running statistics are updated once in every step whatever runs again, saved, resumed, and
what an evaluation normalises with. Compared with PyTorch's own modules over several steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import make_training
from safetensors.torch import load_file
from tiny_plans import module_profile, naive_plan
from torch import Tensor, nn

from tightfit.planner.fleet.members import check_one_model
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.planner.solve.policies import refused_of
from tightfit.profiles.schema import Profile, adamw
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.batches import write_batches
from tightfit.runtime.engine.training.trainer import Training
from tightfit.runtime.session.python_batches import as_planned

LR, STEPS = 1e-2, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = (
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4, momentum=0.3, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """Two equal blocks, one norm that is used twice, and one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.twice, self.still = nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.still(self.twice(self.twice(x.mean((2, 3))) * 2 + 1))
        logits: Tensor = self.head(x)
        return logits


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 5, 5, generator=generator) + 0.5, torch.randint(0, 3, (6,), generator=generator)


def resnet() -> Any:
    return ResNet(), batch(0), nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return module_profile(tmp_path_factory.mktemp("store"), f"{__name__}:resnet")


@pytest.fixture(scope="module")
def data(made: Profile, tmp_path_factory: pytest.TempPathFactory) -> str:
    plan = naive_plan(made)
    path = tmp_path_factory.mktemp("data") / "data"
    return write_batches(str(path), [as_planned(plan, batch(seed), "it") for seed in range(STEPS)])


def evaluated(module: ResNet) -> float:
    """The mean loss on all batches as in an evaluation; the norm in training mode is put back."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    for norm in norms:
        norm.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(module(x), y).item() for x, y in map(batch, range(STEPS))]
    for norm in norms:
        norm.train()
    return sum(losses) / len(losses)


def in_eager(accumulate: int = 1) -> tuple[list[float], float, float, ResNet]:
    """(losses, evaluation before, evaluation after, module) of a loop of PyTorch's."""
    torch.manual_seed(0)
    module, _, loss_fn = resnet()
    before = evaluated(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        loss = loss_fn(module(x), y)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, before, evaluated(module), module


def opened(plan: Plan, data: str, folder: Path) -> Training:
    folder.mkdir(exist_ok=True)
    # The process of a test holds more than a training process.
    training = make_training(plan.model_copy(update={"budget_bytes": 1 << 33}), data, folder, lr=LR)
    training.header["state_dict"] = plan.model.config["state_dict"]
    return training


def trained(plan: Plan, data: str, folder: Path) -> tuple[list[float], float, float, dict[str, Tensor]]:
    training = opened(plan, data, folder)
    training.initialise()
    before = training.evaluate(data, lambda *_: None)["loss"]
    losses = [training.step(number) for number in range(1, STEPS + 1)]
    after = training.evaluate(data, lambda *_: None)["loss"]
    training.save_trained(str(folder))
    training.close()
    return losses, before, after, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_they_are_those_of_pytorch(accumulate: int, made: Profile, data: str, tmp_path: Path) -> None:
    expected, before, after, module = in_eager(accumulate)
    plan = ModelPlanner(made.model_copy(update={"optimizer": adamw(accumulate)})).plan(1 << 33)
    losses, own_before, own_after, saved = trained(plan, data, tmp_path)
    assert losses == pytest.approx(expected, rel=2e-4)
    assert [own_before, own_after] == pytest.approx([before, after], rel=2e-4)
    assert abs(before - after) > 1e-3
    assert set(saved) == set(module.state_dict())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-4)
    assert int(saved["blocks.0.norm1.num_batches_tracked"]) == STEPS
    assert int(saved["twice.num_batches_tracked"]) == 2 * STEPS
    module.load_state_dict(saved, strict=True)


def test_every_plan_has_the_same_bits(made: Profile, data: str, tmp_path: Path) -> None:
    planner = ModelPlanner(made)
    smallest = planner.minimum().peak_bytes
    plans = [naive_plan(made), naive_plan(made, recompute=True), planner.plan(1 << 33)]
    plans += [
        planner.plan(smallest),
        *(planner.plan(1 << 33, policy=rule) for rule in ("checkpoint-layers", "checkpoint-sqrt")),
    ]
    wanted = trained(plans[0], data, tmp_path / "0")
    for number, one in enumerate(plans[1:], 1):
        if number > 1:
            simulate(one)
        found = trained(one, data, tmp_path / str(number))
        assert found[:3] == wanted[:3]
        assert all(torch.equal(found[3][name], value) for name, value in wanted[3].items())


def test_a_resumed_run_goes_on_bit_for_bit(made: Profile, data: str, tmp_path: Path) -> None:
    whole = trained(naive_plan(made), data, tmp_path / "whole")
    first = opened(naive_plan(made), data, tmp_path / "first")
    first.initialise()
    losses = [first.step(number) for number in (1, 2)]
    kept = tmp_path / "kept"
    kept.mkdir()
    state = first.save_state(str(kept))
    first.close()
    second = opened(naive_plan(made, recompute=True), data, tmp_path / "second")
    second.initialise()  # as a resumed run that evaluates the initial state
    assert second.evaluate(data, lambda *_: None)["loss"] == whole[1]
    second.load_state(str(kept), state)
    losses += [second.step(number) for number in (3, 4)]
    assert (losses, second.evaluate(data, lambda *_: None)["loss"]) == (whole[0], whole[2])
    second.close()


def test_ways_to_train_that_do_not_keep_them_refuse(made: Profile) -> None:
    message = r"running statistics, and tiny has some \(blocks\.0\.norm1"
    for policy in ("mezo", "lcsb"):
        assert f"{policy} does not keep running statistics" in refused_of(made)[policy]
        with pytest.raises(InputError, match=message):
            ModelPlanner(made).plan(1 << 33, policy=policy)
    with pytest.raises(InputError, match=f"a fleet does not keep {message}"):
        check_one_model({"a": made, "b": made})


class Other(nn.Module):
    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.ones(4))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.linear(x)).square().mean()


def moving(module: Any, x: Tensor) -> Tensor:
    module.scale.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    scaled: Tensor = x * module.scale
    return scaled


def reading(module: Any, x: Tensor) -> Tensor:
    normed: Tensor = module.norm(x) - module.norm.running_mean
    return normed


def other(change: Callable[[Any, Tensor], Tensor]) -> Callable[[], Any]:
    return lambda: (Other(change), (torch.randn(6, 4),))


moves, reads = other(moving), other(reading)


def averages() -> Any:
    module = Other(lambda module, x: module.norm(x))
    module.norm.momentum = None
    return module, (torch.randn(6, 4),)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("moves", r"Other changes the buffer scale in its forward at .*test_running_statistics\.py:\d+"),
        ("reads", r"Other changes the buffer norm\.running_mean in its forward.*only where nothing else reads them"),
        ("averages", r"norm has momentum=None; give a number, such as 0\.1"),
    ],
)
def test_other_changes_of_buffers_are_refused_by_name(factory: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        module_profile(tmp_path, f"{__name__}:{factory}")
