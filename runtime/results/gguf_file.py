"""Writes a GGUF file with the gguf package's writer, which lays out the header, and the tensors' bytes chunk by chunk, where
that package wants a tensor whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from torch import Tensor

from tightfit.profiles.sources.gguf_metadata import MetadataValue
from tightfit.runtime.results.base_values import rounded
from tightfit.runtime.results.counting import Chunks, Counted
from tightfit.runtime.results.tensor_file import contents

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""GGUF's names of the types that are written here"""
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
FILE_TYPE = "general.file_type"


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    name: str
    shape: Sequence[int]
    """rows first, as numpy has it"""
    kind: str
    """GGUF's name of its type"""
    chunks: Callable[[], Chunks]

    @property
    def bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        count = 1
        for length in self.shape:
            count *= length
        return count // block * size


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[GgufTensor],
    counted: Counted,
) -> None:
    """Write and fsync a file. Raises OSError if the disk refuses."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, one in metadata.items():
        inner = None if one.inner is None else gguf.GGUFValueType(one.inner)
        if key == gguf.Keys.General.ALIGNMENT:
            writer.data_alignment = one.value
        if key != gguf.Keys.General.ARCHITECTURE and not (inner is not None and not len(one.value)):
            writer.add_key_value(key, one.value, gguf.GGUFValueType(one.kind), sub_type=inner)
    for tensor in tensors:
        raw = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for tensor in tensors:
            size = 0
            for chunk in counted(tensor.chunks()):
                file.write(chunk)
                size += len(chunk)
            assert size == tensor.bytes, tensor.name
            writer.write_padding(file, size)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def fitting(kind: str, shape: Sequence[int]) -> str:
    """The type in which a tensor of `shape` is written where `kind` is wanted: of a vector float32, and float16 where rows are
    no whole number of Q8_0's blocks.
    """
    if len(shape) < 2:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind


def encoded(name: str, rows: Tensor, kind: str) -> memoryview:
    """Rows, float32 [n, columns], in one of `TYPES`."""
    if kind == "Q8_0":
        made: np.ndarray[Any, Any] = quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return made.data.cast("B")
    dtype = next(dtype for dtype, known in TYPES.items() if known == kind)
    return contents(rounded(name, rows, dtype))


def file_type(kinds: Sequence[str]) -> MetadataValue:
    """The metadata's word for what most of the tensors are."""
    most = max(FILE_TYPES, key=kinds.count)
    return MetadataValue(value=int(gguf.LlamaFileType[FILE_TYPES[most]]), kind=int(gguf.GGUFValueType.UINT32))
