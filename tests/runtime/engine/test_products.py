"""Products of bfloat16 on processors without instructions for it: equal to the exact sums within one rounding, in
little memory.
"""

from __future__ import annotations

import pytest
import torch

from tightfit.runtime.engine.cpu import operators, products
from tightfit.runtime.engine.cpu.products import multiply

SHAPES = [(7, 5, 3), (64, 48, 200), (64, 200, 48), (300, 8, 500), (8, 300, 500), (300, 500, 8), (1, 1, 1)]


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[False, True], ids=["wide", "narrow"])
def narrow(request, monkeypatch):
    monkeypatch.setattr(products, "NARROW", request.param)
    # Small blocks: every loop goes round more than once.
    monkeypatch.setattr(products, "WIDE_ELEMENTS", 1000)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_the_exact_one_rounded(narrow, shape, turned):
    rows, inner, columns = shape
    left = random(rows, inner)
    right = random(columns, inner, seed=1).t() if turned else random(inner, columns, seed=1)
    exact = left.double() @ right.double()
    scale = (left.double().abs() @ right.double().abs()).clamp(min=1e-30)
    for out in (
        torch.full((rows, columns), 7.0, dtype=torch.bfloat16),
        torch.full((rows, columns), 7.0),
        torch.full((columns, rows), 7.0).t(),
        torch.full((rows, 3 + columns), 7.0)[:, 3:],
    ):
        multiply((left, right, 2.0), out=out)
        assert ((out.double() - 2.0 * exact).abs() / scale).max() < 2.0**-7
        if not narrow and out.dtype is torch.float32:
            assert ((out.double() - 2.0 * exact).abs() / scale).max() < 1e-5


@pytest.mark.parametrize("vector", [False, True])
def test_terms_and_an_addend_are_summed(narrow, vector):
    x, w, low, b = (
        random(60, 90),
        random(70, 90, seed=1),
        random(60, 4, seed=2),
        random(70, 4, dtype=torch.float32, seed=3),
    )
    addend = random(70, seed=4) if vector else random(60, 70, seed=4)
    for scale in (1.0, 0.25):
        exact = scale * x.double() @ w.double().t() + 0.5 * low.double() @ b.double().t() + addend.double()
        out = torch.empty(60, 70, dtype=torch.bfloat16)
        multiply((x, w.t(), scale), (low, b.t(), 0.5), out=out, addend=addend)
        off = (out.double() - exact).norm() / exact.norm()
        assert off < (4e-3 if narrow else 2e-3)


def test_what_is_made_wide_is_rounded_once(monkeypatch):
    monkeypatch.setattr(products, "NARROW", False)
    monkeypatch.setattr(products, "WIDE_ELEMENTS", 1000)  # several blocks of inner elements as well
    x, w = random(40, 300), random(50, 300, seed=1)
    out = torch.empty(40, 50, dtype=torch.bfloat16)
    multiply((x, w.t(), 1.0), out=out)
    # All products of float32 sums here differ by far less than bfloat16 tells apart.
    off = out != (x.double() @ w.double().t()).bfloat16()
    assert off.double().mean() < 0.01


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25, 1.5, -2.0, 0.0])
def test_a_scale_changes_nothing_else(scale, monkeypatch):
    """Where it goes into a factor it does so without an error of its own."""
    monkeypatch.setattr(products, "NARROW", True)
    low, b = random(60, 8), random(70, 8, dtype=torch.float32, seed=1)
    out = torch.empty(60, 70, dtype=torch.bfloat16)
    multiply((low, b.t(), scale), out=out)
    unscaled = torch.mm(low, b.t().bfloat16())
    assert torch.equal(out, unscaled * scale)


def test_both_factors_of_a_pair_have_their_products_in_common(monkeypatch):
    """oneDNN keeps a program for each layout and scale: 0.6 MB that every run holds."""
    monkeypatch.setattr(products, "NARROW", True)
    x, low = random(60, 70), random(60, 8)
    a, b = random(8, 70, dtype=torch.float32), random(70, 8, dtype=torch.float32)

    def programs(*terms):
        return {(*right.shape, *right.stride(), scale) for _, right, scale in map(products._rounded, terms)}

    # Down forward and backward, then up forward and backward, with the scale of the pair where it belongs.
    assert len(programs((x, a.t(), 1.0), (x, b, 2.0))) == 1
    assert len(programs((low, b.t(), 2.0), (low, a, 1.0))) == 1
    weight = random(70, 70)
    assert products._rounded((x, weight.t(), 2.0))[1].data_ptr() == weight.data_ptr()


def test_a_sum_over_nothing_is_nothing(narrow):
    out = torch.full((4, 3), 7.0, dtype=torch.bfloat16)
    multiply((random(4, 5), random(5, 3), 1.0), out=out)
    multiply((random(4, 0), random(0, 3), 1.0), out=out)
    assert not out.any()


def test_no_block_holds_more_than_its_share():
    for rows, inner, columns in [
        (256, 896, 4864),
        (256, 8960, 1536),
        (1024, 576, 1536),
        (4096, 11008, 2048),
        (8, 1024, 4864),
    ]:
        row, column, deep = products._steps(rows, inner, columns)
        assert max(row * deep, deep * column, row * column) <= products.WIDE_ELEMENTS
        assert column == columns or deep == inner


def test_a_projection_and_its_backward_agree_with_autograd(narrow):
    x, w, bias = random(50, 40), random(30, 40, seed=1), random(30, dtype=torch.float32, seed=2)
    a, b, dy = (
        random(4, 40, dtype=torch.float32, seed=3),
        random(30, 4, dtype=torch.float32, seed=4),
        random(50, 30, seed=5),
    )
    low, y, dlow = (torch.empty(50, n, dtype=torch.bfloat16) for n in (4, 30, 4))
    da, db, dx = torch.empty_like(a), torch.empty_like(b), torch.empty_like(x)
    operators.lora_down(x, a, out=(low,))
    operators.projection(x, w, bias, low, b, 2.0, out=(y,))
    operators.lora_backward(dy, x, low, b, 2.0, out=(dlow, da, db))
    operators.projection_backward(dy, w, dlow, a, None, out=(dx,))
    wide = [tensor.double().requires_grad_() for tensor in (x, a, b)]
    expected = wide[0] @ w.double().t() + bias.double() + 2.0 * wide[0] @ wide[1].t() @ wide[2].t()
    gradients = torch.autograd.grad(expected, wide, dy.double())
    for mine, theirs in zip((y, dx, da, db), (expected, *gradients), strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 1e-2


@pytest.mark.parametrize("rounded", [True, False])
def test_the_loss_head_agrees_with_autograd(narrow, rounded):
    """`rounded` is what the trace says, `narrow` what the processor does: bfloat16 is multiplied where both hold."""
    hidden, weight, labels = random(20, 16), random(90, 16, seed=1), torch.randint(0, 90, (20,))
    labels[3] = -1
    state = torch.empty(20, 3 + 16)
    operators.head_begin(hidden, out=(state,))
    for start in range(0, 90, 32):
        part = weight[start : start + 32]
        new = torch.empty_like(state)
        scratch = torch.empty(20 if rounded else 1, len(part), dtype=torch.bfloat16), torch.empty(20, len(part))
        operators.head_chunk(state, hidden, part, labels, start, rounded, out=(new, *scratch))
        state = new
    rows, loss, each, gradient = (
        torch.empty(20, 16, dtype=torch.bfloat16),
        torch.empty(()),
        torch.empty(20),
        torch.empty_like(hidden),
    )
    operators.head_rows(weight, labels, out=(rows,))
    operators.head_finish(state, rows, labels, out=(loss, each, gradient))
    wide = hidden.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide @ weight.double().t(), labels, ignore_index=-1)
    (theirs,) = torch.autograd.grad(expected, wide)
    assert abs(loss.item() - expected.item()) < (3e-2 if narrow and rounded else 1e-4)
    assert (gradient.double() - theirs).norm() / theirs.norm() < 2e-2
