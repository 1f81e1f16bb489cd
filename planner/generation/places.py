"""Tensors that a plan for answers finds a place for, by name."""

from __future__ import annotations

import math

from tightfit.runtime.engine.generation.sizes import aligned

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "bool": 1}
Places = dict[str, tuple[tuple[int, ...], str]]
"""(shape, dtype) of tensors by name"""


def aligned_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor, rounded up so that the next one is aligned."""
    return aligned(math.prod(shape) * ITEM_BYTES[dtype])
