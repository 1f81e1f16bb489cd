"""Writes a GGUF file with the gguf package's writer, which lays out the header, and the tensors' bytes chunk by chunk,
where that package wants a tensor whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from torch import Tensor

from tightfit.profiles.sources.gguf_metadata import MetadataValue
from tightfit.profiles.weights.tensor_file import contents
from tightfit.runtime.common.files import WriteBehind
from tightfit.runtime.results.base_values import rounded
from tightfit.runtime.results.counting import Chunks, WriteProgress

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
    counted: WriteProgress,
) -> None:
    """Write and fsync a file. Raises OSError if the disk refuses."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        inner = None if value.inner is None else gguf.GGUFValueType(value.inner)
        if key == gguf.Keys.General.ALIGNMENT:
            writer.data_alignment = value.value
        if key != gguf.Keys.General.ARCHITECTURE and not (inner is not None and not len(value.value)):
            writer.add_key_value(key, value.value, gguf.GGUFValueType(value.kind), sub_type=inner)
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
        waiting = WriteBehind(file.fileno())
        for tensor in tensors:
            size = 0
            for chunk in counted(tensor.chunks()):
                file.write(chunk)
                size += len(chunk)
                waiting.wrote(len(chunk))
            assert size == tensor.bytes, tensor.name
            writer.write_padding(file, size)
        file.flush()
        waiting.finish()
    finally:
        writer.close()


def type_for(kind: str, shape: Sequence[int]) -> str:
    """The type in which a tensor of `shape` is written where `kind` is wanted: of a vector float32, and float16 where
    rows are no whole number of Q8_0's blocks.
    """
    if len(shape) < 2:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind


def encode_rows(name: str, rows: Tensor, kind: str) -> memoryview:
    """Rows, float32 [n, columns], in one of `TYPES`."""
    if kind == "Q8_0":
        values = np.frombuffer(contents(rows), dtype=np.float32).reshape(rows.shape)
        packed: np.ndarray[Any, Any] = quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return packed.data.cast("B")
    dtype = next(dtype for dtype, kind_of in TYPES.items() if kind_of == kind)
    return contents(rounded(name, rows, dtype))


def file_type(kinds: Sequence[str]) -> MetadataValue:
    """The metadata entry that names the type of most of the tensors."""
    commonest = max(FILE_TYPES, key=kinds.count)
    return MetadataValue(value=int(gguf.LlamaFileType[FILE_TYPES[commonest]]), kind=int(gguf.GGUFValueType.UINT32))
