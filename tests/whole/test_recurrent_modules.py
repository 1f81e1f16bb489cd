"""A module with convolutions, an LSTM with dropout left out of it, and parameters whose gradients are one tensor: every
plan is PyTorch's own training, to the bit the same at every budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import make_training
from tiny_plans import module_profile, naive_plan
from torch import Tensor, nn

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.sources.factory import build_module
from tightfit.runtime.engine.training.batches import write_batches
from tightfit.runtime.session.python_batches import as_planned

LR, STEPS = 1e-3, 3


class Captions(nn.Module):
    """Images [N, 3, 16, 16] to classes, by an LSTM over their rows."""

    def __init__(self) -> None:
        super().__init__()
        point, norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(
            [nn.Sequential(point, norm, nn.ReLU(inplace=True)), nn.Sequential(nn.Conv2d(8, 4, 3, 2, 1), nn.ReLU())]
        )
        self.lstm = nn.LSTM(32, 8, 2, bidirectional=True)
        self.one, self.other = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(4, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        made, (hidden, _) = self.lstm(x.permute(2, 0, 1, 3).flatten(2))
        return self.head(torch.relu(made[-1] + hidden[:2].transpose(0, 1).flatten(1) + self.one + self.other))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def captions() -> Any:
    return Captions(), batch(0), nn.CrossEntropyLoss()


@pytest.mark.slow
def test_every_plan_is_pytorch_s_own_training(tmp_path: Path) -> None:
    made = module_profile(tmp_path / "store", f"{__name__}:captions")
    targets = [operator.target for program in made.programs for operator in program.operators]
    assert targets.count("tightfit.lstm") == targets.count("tightfit.lstm_backward") == 4
    module, _, _ = build_module(f"{__name__}:captions")
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    expected = []
    for step in range(STEPS):
        loss = module(*batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    data = write_batches(
        str(tmp_path / "data"), [as_planned(naive_plan(made), batch(seed), "it") for seed in range(STEPS)]
    )
    planner = ModelPlanner(made)
    smallest = planner.plan(planner.minimum().peak_bytes)
    assert simulate(smallest).peak_bytes == smallest.peak_bytes
    found = []
    for number, plan in enumerate([naive_plan(made), smallest, planner.plan(1 << 33)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        training = make_training(plan.model_copy(update={"budget_bytes": 1 << 33}), data, folder, lr=LR, seed=0)
        training.initialise()
        losses = [training.step(step) for step in range(1, STEPS + 1)]
        values = {one.name: training.storage.value(at).clone() for at, one in enumerate(training.trainables)}
        found.append((losses, values))
        training.close()
    assert found[0][0] == pytest.approx(expected, rel=1e-4)
    for name, value in module.named_parameters():
        torch.testing.assert_close(found[0][1][name], value.detach(), rtol=1e-3, atol=2e-4)
    for losses, values in found[1:]:
        assert losses == found[0][0]
        assert all(torch.equal(values[name], value) for name, value in found[0][1].items())
