"""Operators get tensors whose storages are their own, wherever they lie in the arena: PyTorch's kernels see nothing of
what lies before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import make_training
from safetensors.torch import load_file
from tiny_plans import module_profile, naive_plan
from torch import Tensor, nn

from tightfit.profiles.measuring.worker import _workspace
from tightfit.runtime.engine.cpu.cpu import Cpu
from tightfit.runtime.engine.device.meter import Meter
from tightfit.runtime.engine.training.batches import write_batches
from tightfit.runtime.engine.training.executor import bind
from tightfit.runtime.engine.training.job import program_headers
from tightfit.runtime.session.python_batches import as_planned

LR, STEPS = 1e-2, 4
MIB = 1 << 20


class Windows(nn.Module):
    """Windows of a row, through `as_strided`: their gradient is written into a storage by its offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(12, 16), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.first(x)) * 1.5
        windows = torch.as_strided(rows, (len(x), 2, 6), (16, 8, 1), 1)
        logits: Tensor = self.head(self.norm(windows)).mean(1)
        return logits


def batch(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 12, generator=generator), torch.randint(0, 3, (5,), generator=generator)


def windows() -> Any:
    return Windows(), batch(0), nn.CrossEntropyLoss()


def in_eager() -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    module, _, loss_fn = windows()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        x, labels = batch(step)
        loss = loss_fn(module(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, module.state_dict()


@pytest.mark.parametrize("rule", [{}, {"shift": 64 * 4099}, {"recompute": True}])
def test_an_operator_that_reads_offsets_of_a_storage_trains_as_in_pytorch(rule: Any, tmp_path: Path) -> None:
    made = module_profile(tmp_path, f"{__name__}:windows")
    plan = naive_plan(made, **rule)
    targets = {operator.target for program in plan.programs for operator in program.operators}
    assert "aten.as_strided_scatter.default" in targets
    data = write_batches(str(tmp_path / "data"), [as_planned(plan, batch(seed), "it") for seed in range(STEPS)])
    training = make_training(plan, data, tmp_path, lr=LR)
    training.header["state_dict"] = plan.model.config["state_dict"]
    training.initialise()
    losses = [training.step(number) for number in range(1, STEPS + 1)]
    training.save_trained(str(tmp_path))
    training.close()
    expected, state = in_eager()
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)


def test_an_operator_takes_no_more_memory_where_much_lies_before_its_tensors() -> None:
    value = {"dtype": "float32", "shape": [64], "stride": [1]}
    operand = {"operand": {"value": "x", "size": [64], "stride": [1]}}
    operator = {
        "target": "aten.as_strided_scatter.default",
        "args": [operand, operand, [64], [1], 0],
        "kwargs": {},
        "outputs": ["y"],
        "gathers": [],
    }
    program = {"values": [{"name": name, **value} for name in ("x", "y")], "operators": [operator]}
    device = Cpu(64 * MIB, Meter(1 << 60))
    device.bytes.fill_(0)
    ((bound,),) = bind(program_headers([program]), device, None)
    for read in bound.reads:
        read.move(device.size - 512)
    device.tensor(device.size - 512, [64], "float32").copy_(torch.arange(64.0))
    output = device.tensor(device.size - 256, [64], "float32")
    bound.call([output])
    assert torch.equal(output, torch.arange(64.0))
    assert _workspace(lambda: bound.call([output]), 4) < 8 * MIB
