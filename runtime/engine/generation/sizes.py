"""Sizes that a plan for answers and the process that keeps to it have to agree on: no PyTorch is imported here."""

from __future__ import annotations

from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP

BLOCK_ELEMENTS = 1 << 19
"""of a matrix that are unpacked at a time: 2 MiB in float32"""
SLACK = 4 * GROUP
"""places of a cache beyond the window, so that what is left of it need not be moved for every token"""
TAIL = 8
"""tokens, beyond the first group, of the prompt with which a plan's figures are measured"""
TOKENS = 6
"""tokens of the answer to it"""

ALIGNMENT = 64
"""bytes; every tensor's offset in the arena is a multiple of it"""


def aligned(size: int) -> int:
    """Bytes, rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def block_rows(columns: int, elements: int) -> int:
    """Rows of a block of about `elements` elements: a multiple of 16, so that blocks of any matrix begin where vector
    instructions like it.
    """
    return max(16, elements // columns // 16 * 16)


def cache_places(context: int, window: int | None) -> int:
    """Tokens for which the cache of a layer has places."""
    return context if window is None else min(context, window - 1 + SLACK)
