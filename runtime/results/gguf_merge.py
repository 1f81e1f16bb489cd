"""A merged model as a GGUF file.

From a GGUF file the metadata are copied, and every tensor that the adapter does not touch byte for byte. What it
changes is written in the type that it had where that is no quantised one, and else in Q8_0: rounding to it changes
weights by about 0.6 %, a twelfth of what 4 bits do, so that the adapter is not lost in it, at half the size of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tightfit.profiles.sources.gguf_metadata import MetadataValue, read_header, read_typed
from tightfit.profiles.weights.source import Source, SourceTensor
from tightfit.profiles.weights.tensor_file import FileParts
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.results.adapter_changes import AdapterFolder
from tightfit.runtime.results.base_values import merged_rows, table_blocks
from tightfit.runtime.results.counting import WriteProgress
from tightfit.runtime.results.gguf_file import FILE_TYPE, TYPES, GgufTensor, encode_rows, file_type, type_for, write
from tightfit.runtime.results.llama_cpp import LlamaCpp
from tightfit.runtime.results.place import atomic_output
from tightfit.runtime.results.safetensors_merge import EMBEDDING, HEAD, check_weights

ADVICE = "merge to safetensors, and convert the folder with llama.cpp's convert_hf_to_gguf.py"
PLAIN = tuple(TYPES.values())
"""types that tensors keep; others become Q8_0"""


def write_gguf(
    source: Source, adapter: AdapterFolder, place: Path, dtype: str | None, progress: Progress | None
) -> dict[str, Any]:
    """Write the merged model to the file `place`; returns `bytes`, `files` and `types`, how many of the matrices that
    are no copies have which type. Raises InputError for a base of whose form in llama.cpp tightfit knows nothing.
    """
    model = _MergedGguf(source, adapter, None if dtype is None else TYPES[dtype])
    metadata: dict[str, MetadataValue]
    if source.kind == "gguf":
        metadata, tensors = read_typed(Path(source.path)), model.of_gguf()
    else:
        from tightfit.runtime.results.gguf_of_directory import metadata_of, rope_factors

        metadata, tensors = metadata_of(source, ADVICE), [*model.of_directory(), *rope_factors(source)]
    kinds = [tensor.kind for tensor in tensors if tensor.name in model.made]
    if kinds:
        metadata[FILE_TYPE] = file_type(kinds)
    total = sum(tensor.bytes for tensor in tensors)
    with atomic_output(place, total, folder=False) as path:
        write(path, model.form.facts.architecture, metadata, tensors, WriteProgress(total, progress))
        size = path.stat().st_size
    return {"bytes": size, "files": [place.name], "types": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}


class _MergedGguf:
    def __init__(self, source: Source, adapter: AdapterFolder, kind: str | None) -> None:
        self.form = LlamaCpp(source, ADVICE)
        self._source, self._adapter = source, adapter
        self._kind = kind
        """type of the written tensors; None: each keeps its type if `PLAIN` has it, else it becomes Q8_0"""
        self._tensors = {tensor.entry.name: tensor for tensor in source.tensors()}
        check_weights(adapter, self._tensors)
        self._changed = {*adapter.weights, *adapter.tables}
        self._untied = bool(adapter.tables) and HEAD not in self._tensors
        self.made: set[str] = set()
        """names of the matrices that are no copies"""

    def of_gguf(self) -> list[GgufTensor]:
        """The tensors of a GGUF file in its order."""
        file = FileParts(Path(self._source.path))
        by_key = {tensor.stored.key: tensor for tensor in self._tensors.values() if tensor.stored}
        merged = []
        for original in read_header(file.path).tensors:
            tensor = by_key.get(original.name)
            name = tensor.entry.name if tensor else ""
            chunks = partial(file.chunks, original.start, original.bytes)
            keys = [original.name, *([self.form.name(HEAD)] if self._untied and name == EMBEDDING else [])]
            for key in keys:
                weight = name if key == original.name else HEAD
                if tensor and weight in self._changed:
                    merged.append(self._written(tensor, weight))
                else:
                    merged.append(GgufTensor(name=key, shape=original.shape, kind=original.kind, chunks=chunks))
        return merged

    def of_directory(self) -> list[GgufTensor]:
        """All tensors of a Hugging Face directory, in llama.cpp's form."""
        merged = [self._written(tensor, name) for name, tensor in self._tensors.items()]
        return [*merged, *([self._written(self._tensors[EMBEDDING], HEAD)] if self._untied else [])]

    def _written(self, tensor: SourceTensor, name: str) -> GgufTensor:
        """The tensor `name` in llama.cpp's form; `tensor` is the one that it is, or starts from."""
        key, shape = self.form.name(name), tensor.entry.shape
        if name in self._adapter.tables:
            self._adapter.table(name, shape)
        elif len(shape) > 1:
            self._adapter.pair(name, shape)
        file_type = tensor.stored.dtype if tensor.stored else "F32"
        kind = type_for(self._kind or (file_type if file_type in PLAIN else "Q8_0"), shape)
        if len(shape) > 1:
            self.made.add(key)

        def chunks() -> Iterator[memoryview]:
            for rows in self._rows(tensor, name):
                yield encode_rows(key, rows, kind)

        return GgufTensor(name=key, shape=shape, kind=kind, chunks=chunks)

    def _rows(self, tensor: SourceTensor, name: str) -> Iterator[Tensor]:
        shape = tensor.entry.shape
        if name in self._adapter.tables:
            for _, rows in table_blocks(self._adapter.table(name, shape), shape):
                yield rows
            return
        change = self._adapter.change(name, shape) if len(shape) > 1 else None
        for _, rows in merged_rows(tensor, change, self.form.rows_together(name)):
            if len(shape) > 1:
                yield self.form.ordered(name, rows)
            else:
                yield self.form.ordered(name, rows.view(-1)) + self.form.offset(name)
