"""Reads rows of the tensors in GGUF files: packed where the store keeps their codes, else floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.profiles.models.family import GgufFacts
from tightfit.profiles.sources.gguf_metadata import GgufEntry
from tightfit.profiles.sources.stacked_experts import spans
from tightfit.profiles.weights.store_file import q4_blocks
from tightfit.profiles.weights.tensor_file import FileParts, contents
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import BLOCKS, Entry


def unpermuted_rows(rows: int, heads: int) -> Tensor:
    """For each row of Hugging Face's q or k, its row number in a GGUF file, int64 [rows].

    llama.cpp stores row h * d + 2 i + p for Hugging Face's h * d + p * d / 2 + i (d rows per head, p in {0, 1}).
    """
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def row_reader(
    file: FileParts, tensor: GgufEntry, entry: Entry, facts: GgufFacts, head_dim: int
) -> Callable[[int, int], Tensor]:
    """Reads rows of a tensor, as in `tightfit.profiles.weights.source.SourceTensor`, in Hugging Face's order."""
    order = None
    if facts.permuted and ".self_attn." in entry.name and ("q_proj" in entry.name or "k_proj" in entry.name):
        order = unpermuted_rows(entry.shape[0], entry.shape[0] // head_dim)
    shift = facts.norm_offset if entry.name.endswith("norm.weight") else 0.0
    row_bytes = tensor.bytes // (entry.rows if len(entry.shape) == 1 else math.prod(tensor.shape[:-1]))

    def vector() -> Tensor:
        values = _floats(file, tensor, _block(file, tensor, 0, tensor.bytes).view(1, -1)).view(-1)
        return (values if order is None else values[order]) - shift

    def rows(start: int, stop: int) -> Tensor:
        if len(entry.shape) == 1:
            return vector()
        if order is None:
            block = _block(file, tensor, start * row_bytes, stop * row_bytes).view(-1, row_bytes)
        else:
            wanted = order[start:stop]
            first, last = int(wanted.min()), int(wanted.max()) + 1
            block = _block(file, tensor, first * row_bytes, last * row_bytes).view(-1, row_bytes)[wanted - first]
        packed = _packed(entry, tensor, block)
        return _floats(file, tensor, block) if packed is None else packed

    return rows


def interleaved_rows(readers: Sequence[Callable[[int, int], Tensor]], height: int) -> Callable[[int, int], Tensor]:
    """Reads rows of a matrix that has `height` rows of each reader in turn, again and again."""

    def rows(start: int, stop: int) -> Tensor:
        blocks = []
        for number, first, last in spans(start, stop, height):
            turn, reader = divmod(number, len(readers))
            blocks.append(readers[reader](turn * height + first, turn * height + last))
        return torch.cat(blocks)

    return rows


def _block(file: FileParts, tensor: GgufEntry, start: int, stop: int) -> Tensor:
    """Bytes [start, stop) of a tensor, uint8."""
    return torch.frombuffer(file.read(tensor.start + start, stop - start), dtype=torch.uint8)


def _packed(entry: Entry, tensor: GgufEntry, block: Tensor) -> Tensor | None:
    """Rows in the store's form, uint8 [rows, row bytes], of types whose codes are kept; None for others."""
    if (tensor.kind == "Q8_0" and entry.format == "q8") or entry.format in BLOCKS:
        return block
    if tensor.kind not in ("Q4_0", "Q4_1") or entry.format != "q4":
        return None
    data = block.view(-1, 18 if tensor.kind == "Q4_0" else 20)
    scale = data[:, :2].contiguous().view(torch.float16)
    codes = torch.cat([data[:, -16:] & 15, data[:, -16:] >> 4], dim=1)
    # Q4_0 means (code - 8) * scale; -8 * scale only changes sign and exponent, so it is exact
    minimum = -8 * scale if tensor.kind == "Q4_0" else data[:, 2:4].contiguous().view(torch.float16)
    return q4_blocks(codes, scale, minimum).view(len(block), -1)


def _floats(file: FileParts, tensor: GgufEntry, block: Tensor) -> Tensor:
    """Rows in float32, from their bytes, uint8 [rows, row bytes]."""
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.kind)
    if plain is not None:
        return block.view(plain).float()
    import gguf
    import numpy as np
    from gguf.quants import dequantize

    packed = np.frombuffer(contents(block), dtype=np.uint8).reshape(block.shape)
    try:
        values = dequantize(packed, gguf.GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise InputError(
            f"{file.path}: tensor {tensor.name!r} is {tensor.kind}, which the gguf package cannot unpack; use a Q4_1,"
            " Q4_K_M or Q8_0 file"
        ) from error
    return torch.frombuffer(np.ascontiguousarray(values, dtype=np.float32), dtype=torch.float32).view(len(block), -1)
