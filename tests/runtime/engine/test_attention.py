"""Attention against PyTorch's own in double precision: shapes that do and do not divide into blocks, groups of heads, masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tightfit.runtime.common.processor import features
from tightfit.runtime.engine.cpu.attention import (
    LEAST_KEYS,
    LEAST_QUERIES,
    QUERIES,
    SHARES,
    TOKENS,
    _rotate,
    attention,
    attention_backward,
    attention_scratch,
)

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
    """y and log-sum-exp of [n * T, heads * D] in double precision."""
    seq = cos.shape[0]
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("samples", "seq", "heads", "kv_heads", "width"), SHAPES)
def test_attention_and_its_gradients(samples, seq, heads, kv_heads, width, dtype, tolerance, masked):
    """bfloat16: what goes in and comes out is rounded, nothing between on processors without AMX."""
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
    attention(q, k, v, cos, sin, mask, heads, kv_heads, scale, out=(y, lse, scratch[0]))
    made = [torch.empty_like(x) for x in (q, k, v)]
    attention_backward(dy, q, k, v, y, lse, cos, sin, mask, heads, kv_heads, scale, out=(*made, scratch[1]))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    tables = [x.double() for x in (cos, sin)]
    due, sums = reference(exact, *tables, None if mask is None else mask.double(), heads, kv_heads, scale)
    gradients = torch.autograd.grad(due, exact, dy.double())
    rounded = dtype is torch.bfloat16 and not {"amx_bf16", "bf16", "svebf16"}.isdisjoint(features())
    assert near(lse * math.log(2), sums.detach(), 2e-3 if rounded else 2e-6)
    for found, wanted in zip([y, *made], [due.detach(), *gradients]):
        # A single token's scores have no gradient: there is only dy to compare with.
        assert near(found, wanted, tolerance, 1e-6 * float(dy.double().norm()))


def test_few_queries_attend_together_where_more_would_make_too_many_scores(monkeypatch):
    seq, heads = 2 * QUERIES, 4
    rooms = []
    for scores in (QUERIES * heads * seq, QUERIES * heads * seq - 1):
        monkeypatch.setattr("tightfit.runtime.engine.cpu.attention.SCORES", scores)
        rooms.append(attention_scratch(seq, seq, heads, heads * 8, heads * 8)[1])
        test_attention_and_its_gradients(1, seq, heads, heads, 8, torch.float32, 2e-6, masked=False)
    assert rooms[0] - rooms[1] == (QUERIES - LEAST_QUERIES) * (heads * seq + 2 * heads * 8)


def test_what_is_turned_a_few_tokens_at_a_time_is_turned_by_their_own_angles(monkeypatch):
    x, angles = torch.randn(2, 3, 2, 37, 8), torch.rand(37, 4) * 6
    due = rotated(x, angles.cos(), angles.sin())
    monkeypatch.setattr("tightfit.runtime.engine.cpu.attention.TURNED_ELEMENTS", 5 * x[..., 0, :].numel())
    _rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(x, due)


def near(found, wanted, tolerance, least=0.0):
    """Whether the distance is within a share of the length of what is due."""
    return float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm()) + least


def test_precision_of_other_products_is_left_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    q = torch.randn(8, 8).bfloat16()
    y, lse, scratch = torch.empty_like(q), torch.empty(1, 2, 8), torch.empty(attention_scratch(8, 8, 2, 8, 8))
    tables = torch.ones(8, 2), torch.zeros(8, 2)
    attention(q, q, q, *tables, None, 2, 2, 1.0, out=(y, lse, scratch))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        attention(q, q, q, *tables, None, 2, 2, 1.0, out=(y, lse, scratch[:, :1]))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
