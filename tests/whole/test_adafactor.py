"""Runs with Adafactor: against torch.optim.Adafactor on matrices, vectors, kernels of convolutions and bfloat16, at
two budgets; smallest budgets beside AdamW's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixed_parameters import FACTORY, batch
from safetensors.torch import load_file
from torch import Tensor, nn

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import minimum_budget, plan
from tightfit.planner.problem.optimizers import chosen
from tightfit.profiles.api import profile
from tightfit.profiles.sources.factory import build_module, narrowed
from tightfit.runtime.session.launch import run

STEPS, LR = 6, 1e-2
CHECKPOINT = ("model.safetensors", "optimizer.safetensors")


class Wide(nn.Module):
    """Two matrices of 16 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 8192, bias=False), nn.Linear(8192, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(torch.relu(self.first(x))).square().mean()
        return made


def wide() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Wide(), (torch.randn(4, 512),)


def in_pytorch(dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Losses, parameters and states, both in float32: the module is PyTorch's in `dtype`, its update that of float32
    copies.
    """
    in_full = build_module(FACTORY)[0]
    module = in_full if dtype == torch.float32 else narrowed(*build_module(FACTORY), dtype)[0]
    masters = dict(in_full.named_parameters())
    optimizer = torch.optim.Adafactor(masters.values(), lr=LR)
    losses = []
    for step in range(STEPS):
        images, labels = batch(step)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(masters[name])
        loss = module(images.to(dtype), labels)
        module.zero_grad()
        loss.backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.float()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in masters.items()}, {n: optimizer.state[p] for n, p in masters.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "loss", "near"), [("float32", 1e-4, 1e-2), ("bfloat16", 2e-2, 0.3)])
def test_a_module_is_trained_as_by_torch_with_the_same_bits_at_two_budgets(
    dtype: str, loss: float, near: float, tmp_path: Path, cache: Path
) -> None:
    """At the smaller budget states are on disk; in bfloat16 parameters and states are float32."""
    losses, parameters, states = in_pytorch(getattr(torch, dtype))
    planner = ModelPlanner(chosen(profile(FACTORY, dtype=dtype), "adafactor", None))
    small, roomy = planner.plan(planner.minimum().peak_bytes), planner.plan(1 << 40)
    away = [name for name, place in small.decisions.items() if place == "offloaded" and name.startswith("adafactor_v:")]
    assert away
    batches = [batch(seed) for seed in range(STEPS)]
    files = []
    for made, name in ((roomy, "roomy"), (small, "small")):
        report = run(made, batches, steps=STEPS, out=tmp_path / name, lr=LR)
        assert report["peak_bytes"]["measured"] <= made.peak_bytes
        assert report["loss"] == pytest.approx(losses, rel=loss)
        files.append([(tmp_path / name / f"checkpoint-{STEPS}" / file).read_bytes() for file in CHECKPOINT])
    assert files[0] == files[1]
    values, kept = (load_file(tmp_path / "small" / f"checkpoint-{STEPS}" / file) for file in CHECKPOINT)
    assert values.keys() == parameters.keys() == {name.partition(":")[2] for name in kept}
    for name, expected in parameters.items():
        start = dict(build_module(FACTORY)[0].named_parameters())[name].detach()
        # Compared with how far training has moved it. A kernel of one element moves by a gradient's sign, however small
        # it is.
        assert float((values[name] - expected).norm()) <= near * float((expected - start).norm()) + 1e-7, name
        parts = ("variance",) if expected.dim() < 2 else ("row_var", "col_var")
        theirs = torch.cat([states[name][part].flatten() for part in parts])
        assert kept[f"adafactor_v:{name}"].shape == theirs.shape
        torch.testing.assert_close(kept[f"adafactor_v:{name}"], theirs, rtol=near, atol=float(theirs.max()) * near / 10)


@pytest.mark.slow
def test_the_smallest_budget_is_below_adamws(cache: Path) -> None:
    """A module of two matrices of 16 MiB is trained in 29 MiB less than with AdamW, which has two moments of a matrix
    in memory while it is updated.
    """
    measured = profile(f"{__name__}:wide")
    least = {name: minimum_budget(measured, optimizer=name) for name in ("adamw", "lion", "sgd", "adafactor")}
    assert least["adamw"] - least["adafactor"] > 29 << 20
    assert least["lion"] - least["adafactor"] > 13 << 20
    assert least["adafactor"] - least["sgd"] < 3 << 20
    # Where all states stay in memory, AdamW's are as large as the parameters twice over.
    roomy = {name: plan(measured, 1 << 40, optimizer=name).peak_bytes for name in ("adamw", "adafactor")}
    assert roomy["adamw"] - roomy["adafactor"] > 60 << 20
