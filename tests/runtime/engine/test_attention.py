"""Attention against PyTorch's own in double precision: shapes that do and do not divide into blocks, groups of heads,
masks, rows of several samples.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tightfit.runtime.common.processor import features
from tightfit.runtime.engine.cpu.attention import (
    FEW_KEYS,
    LEAST_KEYS,
    LEAST_QUERIES,
    QUERIES,
    SHARES,
    TOKENS,
    attention,
    attention_backward,
    attention_scratch,
)
from tightfit.runtime.engine.cpu.rotary import rotate

SHAPES = [  # samples, tokens, heads of queries, of keys, columns
    (1, 1, 2, 1, 4),
    (3, 5, 4, 4, 8),
    (5, 100, 6, 3, 16),
    (2, TOKENS, 3, 1, 32),
    (1, TOKENS + 37, 4, 2, 24),
    (1, SHARES * LEAST_KEYS + 3 * QUERIES + 1, 2, 2, 16),
]


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def reference(tensors, cos, sin, mask, heads, kv_heads, scale):
    """y and log-sum-exp of [n * T, heads * D] in double precision; tables [T, D / 2] or [n, 1, T, D / 2]."""
    seq = cos.shape[-2]
    q, k, v = (
        x.view(-1, seq, count, x.shape[1] // count).transpose(1, 2)
        for x, count in zip(tensors, (heads, kv_heads, kv_heads))
    )
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    seen = mask if mask is not None else torch.full((seq, seq), -math.inf, dtype=q.dtype).triu(1)
    y = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    sums = (q @ k.transpose(2, 3) * scale + seen).logsumexp(-1)
    return y.transpose(1, 2).reshape(tensors[0].shape), sums


def positions_of(lengths, seq):
    """int64 [n, T] of rows that hold samples of these lengths; what is left of a row is padding, a sample of its
    own.
    """
    rows = []
    for row in lengths:
        counted = [place for length in [*row, seq - sum(row)] for place in range(length)]
        rows.append(counted)
    return torch.tensor(rows)


def inside(positions):
    """The mask [n, 1, T, T] of causal attention inside each sample."""
    place = torch.arange(positions.shape[1])
    begun = place - positions
    seen = (place[None, None, :] <= place[None, :, None]) & (place[None, None, :] >= begun[:, :, None])
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)[:, None]


def compared(samples, seq, heads, kv_heads, width, dtype, tolerance, *, masked, positions=None):
    """Compare attention and its gradients with PyTorch's."""
    torch.manual_seed(seq)
    scale = 0.7 / math.sqrt(width)
    q, k, v, dy = (torch.randn(samples * seq, count * width).to(dtype) for count in (heads, kv_heads, kv_heads, heads))
    angles = torch.rand(seq, width // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    # A window of 7 tokens, as some layers of Gemma have.
    mask = torch.full((seq, seq), -math.inf).triu(1) + torch.full((seq, seq), -math.inf).tril(-7) if masked else None
    y, lse = torch.empty_like(q), torch.empty(samples, heads, seq)
    scratch = [
        torch.full(attention_scratch(samples * seq, seq, heads, heads * width, kv_heads * width, backward=b), math.nan)
        for b in (False, True)
    ]
    rest = cos, sin, mask, positions, heads, kv_heads, scale
    attention(q, k, v, *rest, out=(y, lse, scratch[0]))
    made = [torch.empty_like(x) for x in (q, k, v)]
    attention_backward(dy, q, k, v, y, lse, *rest, out=(*made, scratch[1]))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    tables = [x.double() for x in (cos, sin)]
    seen = None if mask is None else mask.double()
    if positions is not None:
        tables = [x[positions][:, None] for x in tables]
        seen = inside(positions) if seen is None else inside(positions) + seen
    due, sums = reference(exact, *tables, seen, heads, kv_heads, scale)
    gradients = torch.autograd.grad(due, exact, dy.double())
    rounded = dtype is torch.bfloat16 and not {"amx_bf16", "bf16", "svebf16"}.isdisjoint(features())
    assert near(lse * math.log(2), sums.detach(), 2e-3 if rounded else 2e-6)
    for found, wanted in zip([y, *made], [due.detach(), *gradients]):
        # A single token's scores have no gradient: there is only dy to compare with.
        assert near(found, wanted, tolerance, 1e-6 * float(dy.double().norm()))
    return [y, lse, *made]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("samples", "seq", "heads", "kv_heads", "width"), SHAPES)
def test_attention_and_its_gradients(samples, seq, heads, kv_heads, width, dtype, tolerance, masked):
    """bfloat16: what goes in and comes out is rounded, nothing between on processors without AMX."""
    compared(samples, seq, heads, kv_heads, width, dtype, tolerance, masked=masked)


PARTITIONS = [  # rows of samples, tokens, heads of queries, of keys, columns
    ([[1, 1, 2], [4]], 4, 2, 2, 8),
    ([[30, 70], [1, 2, 3], [99, 1]], 100, 6, 3, 16),
    ([[8] * 32], 256, 3, 1, 32),
    ([[200, 93]], TOKENS + 37, 4, 2, 24),
    ([[37, 300, 5, 1000], [8] * 250], 4 * FEW_KEYS + 1200, 2, 2, 16),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("lengths", "seq", "heads", "kv_heads", "width"), PARTITIONS)
def test_samples_that_share_a_row_do_not_see_each_other(lengths, seq, heads, kv_heads, width, dtype, tolerance, masked):
    positions = positions_of(lengths, seq)
    compared(len(lengths), seq, heads, kv_heads, width, dtype, tolerance, masked=masked, positions=positions)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), masked=st.booleans())
def test_rows_of_any_samples(data, masked):
    seq = data.draw(st.integers(1, 200))
    rows = data.draw(st.integers(1, 3))
    positions = torch.tensor([_row(data, seq) for _ in range(rows)])
    compared(rows, seq, 2, 1, 8, torch.float32, 4e-6, masked=masked, positions=positions)


def _row(data, seq):
    begun = data.draw(st.sets(st.integers(1, max(1, seq - 1)), max_size=min(20, seq))) | {0}
    return [place - max(b for b in begun if b <= place) for place in range(seq)]


@pytest.mark.parametrize(("samples", "seq", "heads", "kv_heads", "width"), SHAPES)
def test_a_row_of_one_sample_has_the_same_bits_with_positions_and_without(samples, seq, heads, kv_heads, width):
    shape = samples, seq, heads, kv_heads, width
    alone = compared(*shape, torch.float32, 2e-6, masked=False)
    counted = torch.arange(seq).repeat(samples, 1)
    assert all(map(torch.equal, alone, compared(*shape, torch.float32, 2e-6, masked=False, positions=counted)))
    if samples > 1 and seq > 1:  # beside a row of several samples too
        counted[-1, seq // 2 :] -= seq // 2
        y, *_ = compared(*shape, torch.float32, 2e-6, masked=False, positions=counted)
        assert torch.equal(y[: (samples - 1) * seq], alone[0][: (samples - 1) * seq])


@pytest.mark.parametrize("seq", [256, 2048])
def test_short_samples_are_multiplied_with_few_keys(seq, monkeypatch):
    """Scores computed, counted by the products' sizes: never more than in a row of one sample."""
    counts = []
    original = torch.bmm

    def counted(left, right, *, out):
        counts[-1] += left.shape[0] * left.shape[1] * left.shape[2] * right.shape[2]
        return original(left, right, out=out)

    monkeypatch.setattr(torch, "bmm", counted)
    for lengths in ([], [1] * (seq - 1), [8] * (seq // 8 - 1), [seq // 2], [seq - 1], [1]):
        counts.append(0)
        attention_of(positions_of([lengths], seq))
    assert max(counts[1:]) <= counts[0]
    assert counts[2] <= counts[0] * (0.7 if seq == 256 else 0.25)


def attention_of(positions):
    rows, seq = positions.shape
    x, tables = torch.randn(rows * seq, 16), (torch.ones(seq, 4), torch.zeros(seq, 4))
    out = torch.empty_like(x), torch.empty(rows, 2, seq), torch.empty(attention_scratch(rows * seq, seq, 2, 16, 16))
    attention(x, x, x, *tables, None, positions, 2, 2, 1.0, out=out)
    return out[0]


def test_few_queries_attend_together_where_more_would_make_too_many_scores(monkeypatch):
    seq, heads = 2 * QUERIES, 4
    rooms = []
    for scores in (QUERIES * heads * seq, QUERIES * heads * seq - 1):
        monkeypatch.setattr("tightfit.runtime.engine.cpu.attention.SCORES", scores)
        rooms.append(attention_scratch(seq, seq, heads, heads * 8, heads * 8)[1])
        test_attention_and_its_gradients(1, seq, heads, heads, 8, torch.float32, 2e-6, masked=False)
    assert rooms[0] - rooms[1] == (QUERIES - LEAST_QUERIES) * ((heads + 1) * seq + 2 * heads * 8)


def test_what_is_turned_a_few_tokens_at_a_time_is_turned_by_their_own_angles(monkeypatch):
    x, angles = torch.randn(2, 3, 2, 37, 8), torch.rand(37, 4) * 6
    due = rotated(x, angles.cos(), angles.sin())
    monkeypatch.setattr("tightfit.runtime.engine.cpu.rotary.TURNED_ELEMENTS", 5 * x[..., 0, :].numel())
    rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(x, due)


def near(found, wanted, tolerance, least=0.0):
    """Whether the distance is within a share of the length of what is due."""
    return float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm()) + least


def test_precision_of_other_products_is_left_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    q = torch.randn(8, 8).bfloat16()
    y, lse, scratch = torch.empty_like(q), torch.empty(1, 2, 8), torch.empty(attention_scratch(8, 8, 2, 8, 8))
    tables = torch.ones(8, 2), torch.zeros(8, 2)
    attention(q, q, q, *tables, None, None, 2, 2, 1.0, out=(y, lse, scratch))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        attention(q, q, q, *tables, None, None, 2, 2, 1.0, out=(y, lse, scratch[:, :1]))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
