"""The values of a base model, as its files have them: float32 rows of every tensor, a few MiB at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tightfit.profiles.weights.source import SourceTensor
from tightfit.profiles.weights.tensor_file import PIECE
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.weights.store import unpack
from tightfit.runtime.results.adapter_changes import WeightChange


def float_rows(tensor: SourceTensor, start: int, stop: int) -> Tensor:
    """Rows of a tensor, float32 [n, columns], dequantised where it is quantised. A vector is one row."""
    entry = tensor.entry
    block = tensor.rows(start, stop)
    if block.dtype != torch.uint8 or entry.format == "uint8":
        return block.float().reshape(stop - start, entry.columns)
    values = torch.empty(stop - start, entry.columns)
    unpack(entry, block.reshape(-1), values)
    return values


def merged_rows(
    tensor: SourceTensor,
    change: WeightChange | None,
    step: int = 1,
) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, rows) of a tensor with its change, block after block, float32 [n, columns]; n is a multiple
    of `step` except at the end.
    """
    entry = tensor.entry
    for start, stop in blocks(entry.rows, entry.columns, step):
        rows = float_rows(tensor, start, stop)
        yield start, rows if change is None else change.rows(rows, start)


def blocks(rows: int, columns: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) of blocks of rows of `PIECE` bytes in float32, or of `step` rows where these are more."""
    size = max(1, PIECE // (4 * columns * step)) * step
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def table_blocks(rows: Callable[[int, int], Tensor], shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """As `merged_rows`, for a module that was trained in full."""
    for start, stop in blocks(*shape):
        yield start, rows(start, stop)


def rounded(name: str, values: Tensor, dtype: str) -> Tensor:
    """float32 values in another type. Raises InputError for those that are too large for it."""
    result = values.to(getattr(torch, dtype))
    if dtype == "float16" and not torch.isfinite(result).all():
        raise InputError(f"{name} holds values above 65504, too large for float16; give {spelled('dtype', 'bfloat16')}")
    return result
