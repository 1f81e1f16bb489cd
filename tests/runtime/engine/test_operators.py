"""The fused operators by themselves: gates beside autograd, what an id below 0 means for rows gathered, where the time
goes in a report.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.operators import embed_rows, gated, gated_backward, head_rows

TABLE = torch.arange(12.0).view(4, 3)
IDS = torch.tensor([[2, -100], [-1, 3]])


class Rows:
    """A weight store of one table."""

    def gather_rows(self, name, rows, out):
        assert name == "table"
        out.copy_(TABLE[rows])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_and_their_gradients(activation, dtype, tolerance, monkeypatch):
    """Beside autograd in double precision, from where a gate is shut to where it is open; the last block is a shorter
    one.
    """
    monkeypatch.setattr("tightfit.runtime.engine.cpu.gates.BLOCK_ELEMENTS", 2 * 1001)
    torch.manual_seed(0)
    gate = (torch.linspace(-40, 40, 5 * 1001).view(5, 1001) + 0.1 * torch.rand(5, 1001)).to(dtype)
    up, dy = (torch.randn(5, 1001).to(dtype) for _ in range(2))
    exact = [x.double().requires_grad_() for x in (gate, up)]
    active = functional.silu(exact[0]) if activation == "silu" else functional.gelu(exact[0], approximate="tanh")
    due = active * exact[1]
    made = [torch.empty_like(gate) for _ in range(3)]
    before = gate.clone(), up.clone()
    gated(gate, up, activation, out=made[:1])
    gated_backward(dy, gate, up, activation, out=made[1:])
    for found, wanted in zip(made, [due.detach(), *torch.autograd.grad(due, exact, dy.double())]):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


@pytest.mark.parametrize("store", [None, Rows()])
def test_an_input_id_below_zero_is_an_error(store):
    out = torch.full((4, 3), -1.0)
    with pytest.raises(InputError, match="the input ids hold -100, and no token is below 0"):
        embed_rows(TABLE if store is None else "table", IDS, 1.0, out=(out,), store=store)
    assert torch.equal(out, torch.full((4, 3), -1.0))


@pytest.mark.parametrize("store", [None, Rows()])
def test_a_label_below_zero_asks_for_nothing(store):
    out = torch.empty(4, 3)
    head_rows(TABLE if store is None else "table", IDS, out=(out,), store=store)
    assert torch.equal(out, TABLE[[2, 0, 0, 3]])
