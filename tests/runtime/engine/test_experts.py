"""The experts of a mixture on the CPU, held against PyTorch's autograd over each of them."""

from __future__ import annotations

import pytest
import torch
from reference import relative_error
from torch import Tensor
from torch.nn import functional as F

from tightfit.profiles.models.experts import Experts
from tightfit.profiles.tracing.expert_ops import mixture, open_mixture
from tightfit.runtime.engine.cpu.experts import _blocks_of, experts, experts_scratch
from tightfit.runtime.engine.device.expert_blocks import BLOCK_ROWS

EXPERTS, HIDDEN, WIDTH = 6, 40, 24
RANK, SCALE = 3, 1.7
LIMIT = 1.5
CLAMPED = f"clamped 1.702 {LIMIT}"


def routed(tokens: int, chosen: int, routing: str) -> Tensor:
    """int64 [tokens, chosen], different experts for each token."""
    generator = torch.Generator().manual_seed(4)
    if routing == "all to one":
        rest = [1 + (torch.randperm(EXPERTS - 1, generator=generator)[: chosen - 1]) for _ in range(tokens)]
        return torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), row]) for row in rest])
    most = 2 if routing == "none to most" else EXPERTS
    return torch.stack([torch.randperm(most, generator=generator)[:chosen] for _ in range(tokens)])


def made(tokens: int, chosen: int, routing: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(5)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    weights = torch.rand(tokens, chosen) + 0.1
    gate_up = (torch.randn(EXPERTS * 2 * WIDTH, HIDDEN) * 0.2).to(dtype)
    down = (torch.randn(EXPERTS * HIDDEN, WIDTH) * 0.2).to(dtype)
    return [x, routed(tokens, chosen, routing), weights, gate_up, down]


def plainly(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """Every expert on every row, in float64; with a limit as gpt-oss has it."""
    act = F.silu if activation == "silu" else lambda value: F.gelu(value, approximate="tanh")
    total = torch.zeros_like(x)
    for number in range(EXPERTS):
        own_bias, last_bias = (None if bias is None else bias[number] for bias in (up_bias, down_bias))
        gate, up = F.linear(x, gate_up.view(EXPERTS, 2 * WIDTH, HIDDEN)[number], own_bias).chunk(2, dim=1)
        if up_bias is None:
            inner = act(gate) * up
        else:
            gate = gate.clamp(max=LIMIT)
            inner = (up.clamp(-LIMIT, LIMIT) + 1) * gate * torch.sigmoid(1.702 * gate)
        own = F.linear(inner, down.view(EXPERTS, HIDDEN, WIDTH)[number], last_bias)
        total = total + own * (weights * (index == number)).sum(1, keepdim=True)
    return total


def adapted(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The matrices of all experts, one below the other, each with the product of its pair, as PEFT has them in `a` and
    `b`.
    """
    of_expert = a.view(EXPERTS, RANK, -1), b.view(-1, RANK, EXPERTS)
    return matrix + SCALE * torch.einsum("eri,ore->eoi", *of_expert).flatten(0, 1)


@pytest.mark.parametrize("pairs", [False, True], ids=["frozen", "with pairs"])
@pytest.mark.parametrize("routing", ["spread", "all to one", "none to most"])
@pytest.mark.parametrize(("tokens", "chosen"), [(300, 2), (7, 2), (64, 1)])
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (torch.float32, "silu"),
        (torch.float32, "gelu_tanh"),
        (torch.float32, CLAMPED),
        (torch.bfloat16, "silu"),
        (torch.bfloat16, CLAMPED),
    ],
)
def test_values_and_gradients_match_autograd(
    routing: str, tokens: int, chosen: int, dtype: torch.dtype, activation: str, pairs: bool
) -> None:
    x, index, weights, gate_up, down = made(tokens, chosen, routing, dtype)
    biased = activation.startswith("clamped")
    biases = (torch.randn(EXPERTS, 2 * WIDTH), torch.randn(EXPERTS, HIDDEN)) if biased else (None, None)
    exact_x, exact_weights = x.double().requires_grad_(), weights.double().requires_grad_()
    exact_biases = [None if bias is None else bias.double() for bias in biases]
    sizes = (EXPERTS * RANK, HIDDEN), (2 * WIDTH, EXPERTS * RANK), (EXPERTS * RANK, WIDTH), (HIDDEN, EXPERTS * RANK)
    factors = [torch.randn(size) * 0.2 for size in sizes] if pairs else []
    exact_factors = [factor.double().requires_grad_() for factor in factors]
    matrices = [gate_up.double(), down.double()]
    if pairs:
        matrices = [adapted(*each) for each in zip(matrices, exact_factors[::2], exact_factors[1::2])]
    exact = plainly(exact_x, index, exact_weights, *matrices, *exact_biases, activation)
    dy = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(6)).to(dtype)
    exact.backward(dy.double())
    # Rounding to bfloat16 carries numbers over the limit, where the gradient jumps.
    most = 1e-5 if dtype is torch.float32 else 1e-1 if biased else 2e-2
    results = []
    for at_once in (1, 4, EXPERTS):
        own_x, own_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        own_factors = [factor.clone().requires_grad_() for factor in factors]
        given = own_factors or [None] * 4
        y = mixture(own_x, index, own_weights, gate_up, down, *biases, activation, at_once, *given, SCALE)
        y.backward(dy)
        assert relative_error(y.detach().double(), exact.detach()) < most
        assert own_x.grad is not None
        assert own_weights.grad is not None
        assert relative_error(own_x.grad.double(), exact_x.grad) < most
        assert relative_error(own_weights.grad.double(), exact_weights.grad) < most
        for own, one in zip(own_factors, exact_factors, strict=True):
            assert own.grad is not None
            assert relative_error(own.grad.double(), one.grad) < most
            assert bool(((one.grad == 0) == (own.grad == 0)).all()), "an expert without rows has no gradient"
        results.append((y.detach(), own_x.grad, own_weights.grad, *(own.grad for own in own_factors)))
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other)), (
            "bits depend on the experts of a call"
        )


def test_rows_are_taken_in_blocks_of_few_sizes_each_once() -> None:
    for count in (*range(1, 70), 255, 256, 257, 700):
        index = torch.full((count, 1), 3)
        found = list(_blocks_of(index, 2, 3))
        assert [number for number, *_ in found] == [1] * len(found)
        assert torch.cat([places for _, places, _ in found]).tolist() == list(range(count))
        assert all(size in BLOCK_ROWS and len(places) <= size for _, places, size in found)
        assert sum(size for *_, size in found) <= max(16, 2 * count)


def test_a_row_may_name_an_expert_twice() -> None:
    """No router does; operators that are warmed on zeros do. An expert has then more rows than there are tokens."""
    x, _, weights, gate_up, down = made(50, 2, "spread", torch.float32)
    index = torch.zeros(50, 2, dtype=torch.int64)
    y = open_mixture(x, index, weights, gate_up, down, None, None, "silu", EXPERTS)
    exact = plainly(x.double(), index, weights.double(), gate_up.double(), down.double(), None, None, "silu")
    assert relative_error(y.double(), exact) < 1e-5


def test_padding_of_a_block_and_old_contents_of_scratch_change_nothing() -> None:
    x, index, weights, gate_up, down = made(50, 2, "spread", torch.float32)
    narrow, wide = experts_scratch(50, HIDDEN, WIDTH, backward=False)
    results = []
    for filling in (0.0, float("nan")):
        y = torch.full(x.shape, filling)
        scratch = torch.full((narrow,), filling), torch.full((wide,), filling)
        experts(None, x, index, weights, gate_up, down, None, None, 0, EXPERTS, "silu", out=(y, *scratch))
        results.append(y)
    assert torch.equal(*results)
    assert torch.equal(results[0], open_mixture(x, index, weights, gate_up, down, None, None, "silu", EXPERTS))


@pytest.mark.parametrize(
    ("experts", "width", "hidden", "rows", "together"),
    [
        (128, 768, 2048, None, 4),
        (8, 14336, 4096, None, 1),
        (12, 96, 128, None, 2),
        (12, 96, 128, 192, 1),
        (12, 96, 128, 900, 4),
    ],
)
def test_how_many_experts_are_taken_together_depends_on_their_size(
    experts: int, width: int, hidden: int, rows: int | None, together: int
) -> None:
    with torch.device("meta"):
        made = Experts(experts, hidden, width, "silu", torch.bfloat16)
    made.slice(rows, 64 << 20)
    assert made.at_once == together
