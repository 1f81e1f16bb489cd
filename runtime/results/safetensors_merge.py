"""The tensors of a merged model for safetensors files, under the names that the base's files have for them.

What the adapter does not touch is copied byte for byte, with whatever else a checkpoint holds (a vision tower), unless
another number type is asked for. Of a GGUF file the tensors get Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.sources.huggingface import checkpoint_files, text_name
from tightfit.profiles.weights.describe import expert_parts
from tightfit.profiles.weights.precision import PUBLISHED
from tightfit.profiles.weights.source import Source, SourceTensor
from tightfit.profiles.weights.tensor_file import TensorFile, contents
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import read_json
from tightfit.runtime.engine.weights.safetensors_file import DTYPES, TensorItem
from tightfit.runtime.results.adapter_changes import AdapterFolder, WeightChange
from tightfit.runtime.results.base_values import blocks, float_rows, merged_rows, rounded, table_blocks

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DEFAULT_DTYPE = "bfloat16"
"""type of weights that are unpacked from codes, where config.json names none"""
SHARD_BYTES = 5 * 10**9
"""largest size of a file, if no tensor is larger"""
_OWN_NAMES = {kind: name for name, kind in DTYPES.items()}


class MergedTensors:
    """A merged model as safetensors items. Raises InputError where adapter and base do not fit together."""

    def __init__(self, source: Source, adapter: AdapterFolder, dtype: str | None) -> None:
        self.source, self.adapter, self._dtype = source, adapter, dtype
        self._tensors = {tensor.entry.name: tensor for tensor in source.tensors()}
        check_weights(adapter, self._tensors)
        self.head = head_name(source) if adapter.tables else ""
        """our name of the head's weight; empty if the adapter changes no embedding and no head"""
        self.untied = bool(adapter.tables) and self.head not in self._tensors
        """whether head and embedding shared a weight in the base and no longer do"""
        self._unpacked = dtype or (_stated_dtype(source) if source.kind == "huggingface" else DEFAULT_DTYPE)

    def items(self) -> list[TensorItem]:
        """All tensors, in the order of the base's files."""
        return [*(self._of_files() if self.source.kind == "huggingface" else self._of_gguf()), *self._untied()]

    # --- from safetensors ---------------------------------------------------------------------------------------------

    def _of_files(self) -> Iterator[TensorItem]:
        by_key: dict[str, SourceTensor] = {}
        for source in self._tensors.values():
            if source.stored is not None:
                by_key |= dict.fromkeys(source.stored.parts or (source.stored.key,), source)
        parts = {part: (one, number) for one in self._tensors.values() for number, part in enumerate(one.parts)}
        quantised = any(source.stored and source.stored.parts for source in self._tensors.values())
        seen: set[str] = set()
        for path in checkpoint_files(Path(self.source.path)):
            file = TensorFile(path)
            for key, (kind, _) in file.tensors.items():
                tensor = by_key.get(key)
                if tensor is None and self.untied and text_name(key) == self.head:
                    continue  # a copy of the embedding, in whose place comes a head of its own
                if key in parts:  # a matrix of one expert, of those that stand below one another in our tensor
                    stacked, number = parts[key]
                    yield self._of_file(file, key, stacked, number * (stacked.entry.rows // len(stacked.parts)))
                    continue
                if tensor is None and quantised and kind not in PUBLISHED:
                    raise InputError(
                        f"{path}: tensor {key!r} ({kind}) is quantised and belongs to no part of the model that"
                        " tightfit reads; use the model's 16-bit weights"
                    )
                if tensor is None or tensor.stored is None or not tensor.stored.parts:
                    yield self._of_file(file, key, tensor)
                elif tensor.stored.key not in seen:
                    seen.add(tensor.stored.key)
                    yield self._of_source(tensor, tensor.stored.key, self._unpacked)

    def _of_file(self, file: TensorFile, key: str, tensor: SourceTensor | None, first: int = 0) -> TensorItem:
        """A tensor that its file holds in floating-point numbers, or of which tightfit knows nothing; `first`: which
        row of ours its first one is.
        """
        kind, shape = file.tensors[key]
        file_dtype = _OWN_NAMES.get(kind)
        dtype = self._dtype if self._dtype and kind in PUBLISHED else file_dtype
        if dtype is None:
            raise InputError(
                f"{file.path}: tensor {key!r} is {kind}, which cannot be copied; use the model's 16-bit weights"
            )
        name = tensor.entry.name if tensor else ""
        if tensor and name in self.adapter.tables:
            return self._of_table(name, key, tensor.entry.shape, dtype)
        changed = tensor is not None and self.adapter.pair(name, tensor.entry.shape) is not None
        if not changed and dtype == file_dtype:
            return TensorItem(name=key, dtype=dtype, shape=list(shape), chunks=lambda: file.chunks(key))
        transposed = bool(tensor and tensor.stored and tensor.stored.transposed)

        def values() -> Iterator[Tensor]:
            change = self.adapter.change(name, tensor.entry.shape) if tensor else None
            if change is not None and transposed:
                yield from _transposed(file, key, shape, change)
                return
            if change is not None:
                for start, stop in blocks(_product(shape[:-1]), shape[-1]):
                    yield change.rows(file.matrix_rows(key, start, stop).float(), first + start)
                return
            columns = 1 if len(shape) < 2 else max(1, _product(shape[1:]))
            for start, stop in blocks(shape[0] if shape else 1, columns):
                yield file.rows(key, start, stop).float()

        return _item(key, dtype, shape, values)

    # --- from any source, by tightfit's names -----------------------------------------------------------------------

    def _of_gguf(self) -> Iterator[TensorItem]:
        experts = decoder_shape(self.source.config).experts
        for name, tensor in self._tensors.items():
            rows, *columns = tensor.entry.shape
            if name in self.adapter.tables:
                yield self._of_table(name, name, tensor.entry.shape, self._unpacked)
            elif expert_parts(name):  # transformers has the matrices of experts in three dimensions
                yield self._of_source(tensor, name, self._unpacked, (experts, rows // experts, *columns))
            else:
                yield self._of_source(tensor, name, self._unpacked)

    def _of_source(
        self, tensor: SourceTensor, key: str, dtype: str, shape: tuple[int, ...] | None = None
    ) -> TensorItem:
        self.adapter.pair(tensor.entry.name, tensor.entry.shape)

        def values() -> Iterator[Tensor]:
            change = self.adapter.change(tensor.entry.name, tensor.entry.shape)
            for _, rows in merged_rows(tensor, change):
                yield rows

        return _item(key, dtype, shape or tensor.entry.shape, values)

    def _of_table(self, name: str, key: str, shape: tuple[int, ...], dtype: str) -> TensorItem:
        rows = self.adapter.table(name, shape)

        def values() -> Iterator[Tensor]:
            for _, block in table_blocks(rows, shape):
                yield block

        return _item(key, dtype, shape, values)

    def _untied(self) -> Iterator[TensorItem]:
        """The head of a base whose head was its embedding, if one of them was trained by itself."""
        if not self.untied:
            return
        embedding = next(tensor for name, tensor in self._tensors.items() if name == embedding_name(self.source))
        shape = embedding.entry.shape
        file_dtype = PUBLISHED.get(embedding.stored.dtype) if embedding.stored else None
        dtype = self._dtype or (
            file_dtype if file_dtype in DTYPES and self.source.kind == "huggingface" else self._unpacked
        )
        if self.head in self.adapter.tables:
            yield self._of_table(self.head, self.head, shape, dtype)
            return

        def values() -> Iterator[Tensor]:
            for start, stop in blocks(*shape):
                yield float_rows(embedding, start, stop)

        yield _item(self.head, dtype, shape, values)


def check_weights(adapter: AdapterFolder, tensors: Iterable[str]) -> None:
    """Raise InputError for a pair of a weight that is none of the base's `tensors`."""
    known = set(tensors)
    for name in adapter.weights:
        if name not in known:
            raise InputError(
                f"{adapter.folder}: the base has no {name}, which the adapter changes; give the base that the adapter"
                f" was trained on with {spelled('base')}"
            )


def embedding_name(source: Source) -> str:
    """Our name of the embedding's weight."""
    return EMBEDDING if source.decoder is None else source.decoder.embedding


def head_name(source: Source) -> str:
    """Our name of the head's weight, if it had one of its own."""
    return HEAD if source.decoder is None else source.decoder.head


def _stated_dtype(source: Source) -> str:
    """The number type that a config.json names for its weights."""
    stated = source.config.get("dtype") or source.config.get("torch_dtype")
    return stated if stated in ("float32", "float16", "bfloat16") else DEFAULT_DTYPE


def _transposed(file: TensorFile, key: str, shape: tuple[int, ...], change: WeightChange) -> Iterator[Tensor]:
    """Blocks of a changed weight whose file has rows and columns the other way round."""
    factor = None
    if change.magnitude is not None:
        squares = torch.zeros(shape[1], dtype=torch.float64)
        for start, stop in blocks(*shape):
            squares += change.columns(file.rows(key, start, stop).float(), start).double().square().sum(0)
        factor = change.magnitude / squares.sqrt().float()
    for start, stop in blocks(*shape):
        columns = change.columns(file.rows(key, start, stop).float(), start)
        yield columns if factor is None else columns * factor


def _item(key: str, dtype: str, shape: tuple[int, ...], values: Callable[[], Iterator[Tensor]]) -> TensorItem:
    def chunks() -> Iterator[memoryview]:
        for block in values():
            yield contents(rounded(key, block, dtype))

    return TensorItem(name=key, dtype=dtype, shape=list(shape), chunks=chunks)


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


# --- what lies beside the tensors -----------------------------------------------------------------------------------


def shards(items: list[TensorItem]) -> list[list[TensorItem]]:
    """The items in groups of at most `SHARD_BYTES`, each a file."""
    groups: list[list[TensorItem]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.bytes
    return groups


def merged_config(source: Source, *, untied: bool, dtype: str | None) -> dict[str, Any]:
    """The config.json of a merged model: the base's, without its quantisation."""
    if source.kind == "gguf":
        return _config_of_gguf(source, dtype or DEFAULT_DTYPE)
    config: dict[str, Any] = read_json(Path(source.path) / "config.json")
    quantised = False
    parts = [config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])]
    for part in parts:
        quantised = bool(part.pop("quantization_config", None)) or quantised
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    stated_dtype = dtype or (_stated_dtype(source) if quantised else None)
    for part in parts if stated_dtype else ():
        for name in [name for name in ("dtype", "torch_dtype") if name in part] or ["dtype"]:
            part[name] = stated_dtype
    return config


def _config_of_gguf(source: Source, dtype: str) -> dict[str, Any]:
    from tightfit.profiles.weights.source import without_names

    config = without_names(source.config)
    kind = str(config["model_type"])
    class_name = "".join(word.capitalize() for word in kind.removesuffix("_text").split("_"))
    return {"architectures": [f"{class_name}ForCausalLM"], **config, "dtype": dtype}
