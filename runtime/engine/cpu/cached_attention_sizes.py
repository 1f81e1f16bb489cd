"""How much scratch attention to a cache needs, for plans: no PyTorch is imported here."""

from __future__ import annotations

GROUP = 32
"""new tokens that are worked on together, at most"""
SCORES = 1 << 18
"""float32 scores that are made at a time, unless a single token has more"""


def cache_scratch(kv_columns: int) -> int:
    """Elements of the scratch of `cache_tokens` for `GROUP` tokens with `kv_columns` = K * D columns."""
    return GROUP * kv_columns


def attention_cache_scratch(heads: int, kv_heads: int, width: int, seen: int, *, narrow: bool) -> int:
    """Most elements of the scratch of `cached_attention` with up to `seen` keys; `narrow`: the cache is not float32."""
    queries = 2 * GROUP * heads * width
    scores = min(max(SCORES, heads * seen), GROUP * heads * seen)
    return queries + scores + (kv_heads * seen * width if narrow else 0)


def queries_together(heads: int, seen: int) -> int:
    """Queries that are worked on together, where the last one sees so many keys."""
    return max(1, min(GROUP, SCORES // (heads * seen)))
