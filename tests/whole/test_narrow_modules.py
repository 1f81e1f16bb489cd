"""Modules in bfloat16: parameters are float32 where they are updated, and rounded where the module reads them. Compared
with that loop written out in PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import make_training
from safetensors.torch import load_file
from torch import Tensor, nn

from tightfit import plan, profile, run
from tightfit.planner.model_planner import ModelPlanner
from tightfit.profiles.sources.factory import build_module, narrowed
from tightfit.runtime.engine.training.batches import write_batches
from tightfit.runtime.session.python_batches import as_planned

LR, STEPS = 1e-3, 4


class Net(nn.Module):
    """A weight that is used twice, a frozen one, and a norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(12, 16), nn.Linear(16, 16)
        self.norm, self.frozen = nn.BatchNorm1d(16), nn.Linear(16, 16).requires_grad_(False)

    def forward(self, words: Tensor, scale: Tensor) -> Tensor:
        x = self.embed(words) * scale
        x = self.frozen(torch.tanh(self.norm(self.first(x))))
        return x @ self.embed.weight.t()


def batch(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    words, labels = torch.randint(0, 12, (2, 8), generator=generator)
    return (words, torch.rand(8, 1, generator=generator) + 0.5), labels


def net() -> Any:
    return Net(), batch(0), nn.CrossEntropyLoss()


def written_out() -> tuple[list[float], dict[str, Tensor]]:
    """(losses, trained parameters in float32): the module is PyTorch's in bfloat16, its update that of float32
    copies.
    """
    wide = build_module(f"{__name__}:net")[0]
    module, *_ = narrowed(*build_module(f"{__name__}:net"), torch.bfloat16)
    masters = {name: p for name, p in wide.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(masters.values(), lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        (words, scale), labels = batch(step)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in masters:
                    parameter.copy_(masters[name])
        loss = module(words, scale.bfloat16(), labels)
        module.zero_grad()
        loss.backward()
        for name, parameter in module.named_parameters():
            if name in masters:
                assert parameter.grad is not None
                masters[name].grad = parameter.grad.float()
        optimizer.step()
        losses.append(loss.item())
    held = {name: master.detach() for name, master in masters.items()} | dict(module.named_buffers())
    return losses, held


@pytest.mark.slow
def test_a_run_is_the_loop_written_out(tmp_path: Path, cache: Path) -> None:
    """In a run at the smallest budget, and in a plan with ample memory to the same bits."""
    losses, expected = written_out()
    measured = profile(f"{__name__}:net", dtype="bfloat16")
    assert measured.model.compared is not None
    assert measured.model.compared.startswith(
        "loss and gradients are PyTorch's in 3 steps of AdamW on different batches, "
    )
    kinds = {t.name: (t.kind, t.dtype) for t in measured.tensors}
    assert kinds["embed.weight"] == ("trainable", "float32")
    assert kinds["frozen.weight"] == ("weight", "bfloat16")
    assert kinds["norm.running_mean"] == ("constant", "float32")
    assert kinds["batch1"] == ("batch", "bfloat16")
    batches = [batch(seed) for seed in range(STEPS)]
    planner = ModelPlanner(measured)
    report = run(plan(measured, planner.minimum().peak_bytes), batches, steps=STEPS, out=tmp_path / "run", lr=LR)
    assert report["loss"] == pytest.approx(losses, rel=2e-2)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=2e-2, atol=2 * LR)
    module = build_module(f"{__name__}:net")[0]
    module.load_state_dict(saved, strict=True)

    ample = planner.plan(1 << 33)
    data = write_batches(str(tmp_path / "data"), [as_planned(ample, one, "it") for one in batches])
    training = make_training(ample, data, tmp_path, lr=LR)
    training.header["state_dict"] = ample.model.config["state_dict"]
    training.initialise()
    threads = torch.get_num_threads()
    torch.set_num_threads(measured.device.threads)  # those of the run: running statistics are sums over them
    try:
        assert [training.step(number) for number in range(1, STEPS + 1)] == report["loss"]
    finally:
        torch.set_num_threads(threads)
    training.save_trained(str(tmp_path))
    training.close()
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in saved.items())
