"""The LoRA pairs alone as a GGUF file, as llama.cpp's convert_lora_to_gguf.py writes it and llama.cpp loads it beside a
model (``--lora``).

llama.cpp multiplies a pair by alpha / rank with one alpha for the whole file; where pairs have other scales, they are
in their B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from tightfit.profiles.sources.gguf_metadata import MetadataValue
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.results.adapter_changes import AdapterFolder
from tightfit.runtime.results.counting import WriteProgress
from tightfit.runtime.results.gguf_file import TYPES, GgufTensor, encode_rows, write
from tightfit.runtime.results.llama_cpp import LlamaCpp
from tightfit.runtime.results.place import atomic_output
from tightfit.runtime.results.safetensors_merge import check_weights

ADVICE = "convert the adapter with llama.cpp's convert_lora_to_gguf.py"


def write_gguf(
    source: Source, adapter: AdapterFolder, place: Path, dtype: str | None, progress: Progress | None
) -> dict[str, Any]:
    """Write the adapter for the base `source` to the file `place`, in float32 or `dtype`; returns `bytes` and `files`.

    Raises InputError for what llama.cpp's adapters have no form of: magnitudes of DoRA and modules trained in full.
    """
    if adapter.settings.dora or adapter.tables:
        unsupported = "DoRA's magnitudes" if adapter.settings.dora else "modules that were trained in full"
        raise InputError(
            f"{adapter.folder} has {unsupported}, and an adapter of llama.cpp has LoRA pairs alone; merge it without"
            f" {spelled('adapter_only')}"
        )
    llama_cpp = LlamaCpp(source, ADVICE)
    shapes = {tensor.entry.name: tensor.entry.shape for tensor in source.tensors()}
    check_weights(adapter, shapes)
    kind, alpha = TYPES[dtype or "float32"], adapter.settings.scaled_alpha
    tensors = []
    for weight in adapter.weights:
        shape = shapes[weight]
        pair = adapter.pair(weight, shape)
        assert pair is not None

        def factors(weight: str = weight, shape: tuple[int, ...] = shape) -> tuple[Tensor, Tensor]:
            change = adapter.change(weight, shape)
            assert change is not None
            factor = change.scale * len(change.a) / alpha
            return change.a, llama_cpp.ordered(weight, change.b if math.isclose(factor, 1.0) else change.b * factor)

        for number, (letter, size) in enumerate((("a", (pair.rank, shape[1])), ("b", (shape[0], pair.rank)))):
            name = f"{llama_cpp.name(weight)}.lora_{letter}"

            def chunks(name: str = name, number: int = number, factors: Any = factors) -> Iterator[memoryview]:
                yield encode_rows(name, factors()[number], kind)

            tensors.append(GgufTensor(name=name, shape=size, kind=kind, chunks=chunks))
    text, number = int(gguf.GGUFValueType.STRING), int(gguf.GGUFValueType.FLOAT32)
    metadata = {
        gguf.Keys.General.TYPE: MetadataValue(value=gguf.GGUFType.ADAPTER, kind=text),
        gguf.Keys.General.NAME: MetadataValue(value=f"{source.name} adapter", kind=text),
        gguf.Keys.Adapter.TYPE: MetadataValue(value="lora", kind=text),
        gguf.Keys.Adapter.LORA_ALPHA: MetadataValue(value=alpha, kind=number),
    }
    total = sum(tensor.bytes for tensor in tensors)
    with atomic_output(place, total, folder=False) as path:
        write(path, llama_cpp.facts.architecture, metadata, tensors, WriteProgress(total, progress))
        size_written = path.stat().st_size
    return {"bytes": size_written, "files": [place.name]}
