"""Attention to a cache against PyTorch's own in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tightfit.runtime.engine.cpu.cached_attention import cache_tokens, cached_attention
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP, SCORES, attention_cache_scratch, cache_scratch

SHAPES = [  # tokens before, new tokens, heads of queries, of keys, columns, window
    (0, 1, 2, 1, 4, None),
    (0, GROUP, 4, 4, 8, None),
    (70, 5, 6, 3, 16, None),
    (70, GROUP, 4, 2, 8, 9),
    (3, GROUP, 4, 2, 8, 9),
    (200, 1, 4, 1, 8, 50),
    (2 * SCORES // 8 // GROUP, GROUP, 8, 2, 4, None),
]


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("before", "new", "heads", "kv_heads", "width", "window"), SHAPES)
def test_attention_to_a_cache(
    before: int, new: int, heads: int, kv_heads: int, width: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    whole = before + new
    q = torch.randn(new, heads * width)
    k, v = (torch.randn(whole, kv_heads * width) for _ in range(2))
    angles = torch.rand(whole, width // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    keys, values = (torch.full((kv_heads, whole + 3, width), math.nan, dtype=dtype) for _ in range(2))
    scratch = torch.full((cache_scratch(kv_heads * width),), math.nan)
    for start in range(0, whole, GROUP):
        part = slice(start, min(start + GROUP, whole))
        cache_tokens(k[part], v[part], cos[part], sin[part], out=(keys[:, part], values[:, part], scratch))
    y = torch.full_like(q, math.nan)
    size = attention_cache_scratch(heads, kv_heads, width, whole, narrow=dtype is not torch.float32)
    room = torch.full((size,), math.nan)
    new_places = slice(before, whole)
    cached_attention(
        q, keys[:, :whole], values[:, :whole], cos[new_places], sin[new_places], window, 0, 0.3, out=(y, room)
    )

    own = turned(q.double().view(new, heads, width), cos[new_places, None], sin[new_places, None]).transpose(0, 1)
    exact_keys, exact_values = (x[:, :whole].double().repeat_interleave(heads // kv_heads, 0) for x in (keys, values))
    places = torch.arange(whole)
    distance = places[new_places, None] - places[None, :]
    mask = (distance >= 0) & (distance < (window or whole + 1))
    due = scaled_dot_product_attention(own, exact_keys, exact_values, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(y.double(), due.transpose(0, 1).reshape(new, -1), rtol=1e-4, atol=1e-5)
    rotated = turned(k.double().view(whole, kv_heads, width), cos[:, None], sin[:, None]).transpose(0, 1)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(keys[:, :whole].double(), rotated, rtol=tolerance, atol=tolerance)
