"""Opens models in GGUF files.

Quantised values are kept, code for code: Q4_0, Q4_1 and Q8_0 in the store's own groups, Q5_0, Q5_1 and K-quants in
blocks as they are in the file. Types that the store has no form of (IQ4_XS, MXFP4 and others) are unpacked to bfloat16,
which rounds as unpacking them in a step would. Matrices in F16, BF16 and F32 get the precision that is asked for.
llama.cpp permutes the rows of
Llama's q and k for its interleaved rotary embedding; they are put back into Hugging Face's half-split order. GGUF files
hold Gemma's norm weights with 1 added; it is subtracted again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.models.family import GgufFacts, family_of
from tightfit.profiles.sources.gguf_config import config_from_metadata
from tightfit.profiles.sources.gguf_metadata import read_metadata
from tightfit.profiles.weights.describe import EMBEDDINGS, decoder_tensors, packed_entry
from tightfit.profiles.weights.pack import q4_blocks
from tightfit.profiles.weights.precision import DEFAULT, PUBLISHED, Matrix, Precision, check_choice, said
from tightfit.profiles.weights.source import Source, SourceTensor, StoredTensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import BLOCKS, VERSION, Entry

KEPT = {"Q4_0": ("q4", 32), "Q4_1": ("q4", 32), "Q8_0": ("q8", 32)} | {
    kind.upper(): (kind, elements) for kind, (elements, _) in BLOCKS.items()
}
"""Format and group in the store of the types whose codes are kept."""
UNPACKED = "bfloat16"
"""Format of matrices in any other quantised type."""
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class Reader(gguf.GGUFReader):
    """gguf's reader on a plain array: slicing a memmap for each of 100,000 strings takes three times as long."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)


def gguf_source(path: Path, *, precision: Precision = DEFAULT) -> Source:
    """The model in a GGUF file; `precision` is that of matrices which the file does not hold quantised.

    Raises InputError if the file is damaged, split, or of an unsupported architecture, and if no matrix of it can have
    the precision.
    """
    metadata = read_metadata(path)
    try:
        reader = Reader(path)
    except Exception as error:  # a damaged file makes the reader raise all kinds of errors
        raise InputError(
            f"{path}: not a readable GGUF file ({error}); it is truncated or damaged, download it again"
        ) from error
    if metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{path}: one of {metadata['split.count']} parts; join them with llama.cpp's gguf-split --merge"
        )
    found = {tensor.name: tensor for tensor in reader.tensors}
    try:
        if "token_embd.weight" not in found:
            raise InputError("no tensor 'token_embd.weight'; only language models can be used")
        factors = found.pop("rope_freqs.weight", None)
        config = config_from_metadata(
            metadata,
            vocabulary=int(found["token_embd.weight"].shape[1]),
            tied="output.weight" not in found,
            rope_factors=None if factors is None else torch.tensor(factors.data, dtype=torch.float32),
        )
        parts = _match(config, found, precision)
        matrices = [
            Matrix(entry, tensor.tensor_type.name, entry.name in EMBEDDINGS)
            for entry, tensor in parts
            if len(entry.shape) > 1
        ]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    check_choice(path, precision, matrices)
    stat = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(int(reader.data_offset)))
    formats = [entry.format for entry, _ in parts]
    text = json.dumps([VERSION, "gguf", head.hexdigest(), stat.st_size, stat.st_mtime_ns, formats])

    def tensors() -> Iterable[SourceTensor]:
        for entry, tensor in parts:
            rows = _row_reader(path, config, entry, tensor)
            held = StoredTensor(key=tensor.name, dtype=tensor.tensor_type.name)
            yield SourceTensor(entry=entry, rows=rows, place=f"{path}: tensor {tensor.name!r}", held=held)

    return Source(
        name=path.stem,
        kind="gguf",
        path=str(path),
        config=config,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        has_weights=True,
        entries={entry.name: entry for entry, _ in parts},
        tensors=tensors,
        note=said(matrices),
        base=precision.base,
        embeddings=precision.embeddings,
    )


def unpermuted_rows(rows: int, heads: int) -> Tensor:
    """For each row of Hugging Face's q or k, its row number in a GGUF file, int64 [rows].

    llama.cpp stores row h * d + 2 i + p for Hugging Face's h * d + p * d / 2 + i (d rows per head, p in {0, 1}).
    """
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _match(config: dict[str, Any], found: dict[str, Any], precision: Precision) -> list[tuple[Entry, Any]]:
    """(entry, tensor in the file) for every tensor of the decoder. Raises InputError for missing or unexpected ones."""
    named = {_hugging_face_name(config, name): tensor for name, tensor in found.items()}
    shape = decoder_shape(_with_biases(config, named))
    kept = any(tensor.tensor_type.name not in PUBLISHED for tensor in named.values())
    parts = []
    for name, size in decoder_tensors(shape):
        tensor = named.pop(name, None)
        if tensor is None:
            raise InputError(f"no tensor for {name!r}; the file is incomplete, convert the model again")
        held = tuple(int(n) for n in reversed(tensor.shape))
        if held != size:
            raise InputError(
                f"tensor {tensor.name!r} has shape {list(held)} where {list(size)} is due; the file's metadata does not fit its weights"
            )
        kind = tensor.tensor_type.name
        if len(size) == 1:
            entry = packed_entry(name, size, "float32")
        elif kind in KEPT:
            form, group = KEPT[kind]
            entry = Entry(name=name, shape=size, format=form, group=group)
        elif kind in PUBLISHED:
            form = precision.format(PUBLISHED[kind], embedding=name in EMBEDDINGS, kept=kept)
            entry = packed_entry(name, size, form)
        else:
            entry = Entry(name=name, shape=size, format=UNPACKED)
        parts.append((entry, tensor))
    if named:
        raise InputError(
            f"tensor {next(iter(named.values())).name!r} belongs to no {config['model_type']} decoder; this variant is not supported"
        )
    return parts


def _with_biases(config: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """The config, completed by whether the model has biases: GGUF metadata do not say so, but the tensors show it."""
    named_bias = "model.layers.0.self_attn.q_proj.bias" in named
    config["attention_bias"] = named_bias and not family_of(config).always_biased
    config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in named
    return config


def _facts(config: dict[str, Any]) -> GgufFacts:
    facts = family_of(config).gguf
    assert facts is not None  # the config was made from a GGUF file, so its family has them
    return facts


def _hugging_face_name(config: dict[str, Any], name: str) -> str:
    names = _facts(config).names
    match = _LAYER.fullmatch(name)
    if match and match[2] in names:
        return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"
    stem, _, suffix = name.rpartition(".")
    return f"{names.get(stem, stem)}.{suffix}"


def _row_reader(path: Path, config: dict[str, Any], entry: Entry, tensor: Any) -> Callable[[int, int], Tensor]:
    kind, order = tensor.tensor_type, None
    facts = _facts(config)
    if facts.permuted and ".self_attn." in entry.name and ("q_proj" in entry.name or "k_proj" in entry.name):
        size = entry.shape[0]
        order = unpermuted_rows(size, size // config["head_dim"]).numpy()
    shift = facts.norm_offset if entry.name.endswith("norm.weight") else 0.0
    shared = np.asarray(tensor.data)

    def rows(start: int, stop: int) -> Tensor:
        if len(entry.shape) == 1:
            vector = torch.from_numpy(np.array(dequantize(shared, kind), dtype=np.float32))
            return (vector if order is None else vector[torch.from_numpy(order)]) - shift
        block = np.array(shared[start:stop] if order is None else shared[order[start:stop]])
        try:
            return _repack(entry, block, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{path}: tensor {tensor.name!r} is {kind.name}, which the gguf package cannot unpack; use a Q4_1, Q4_K_M or Q8_0 file"
            ) from error

    return rows


def _repack(entry: Entry, block: np.ndarray[Any, Any], kind: Any) -> Tensor:
    """Rows of a quantised matrix: packed uint8 for the types whose codes are kept, floats for the others."""
    count = block.shape[0]
    if kind.name == "Q8_0" or entry.format in BLOCKS:
        return torch.from_numpy(block).view(count, -1)
    if kind.name in ("Q4_0", "Q4_1"):
        data = torch.from_numpy(block).view(-1, 18 if kind.name == "Q4_0" else 20)
        scale = data[:, :2].contiguous().view(torch.float16)
        codes = torch.cat([data[:, -16:] & 15, data[:, -16:] >> 4], dim=1)
        # Q4_0 means (code - 8) * scale; -8 * scale only changes sign and exponent, so it is exact
        minimum = -8 * scale if kind.name == "Q4_0" else data[:, 2:4].contiguous().view(torch.float16)
        return q4_blocks(codes, scale, minimum).view(count, -1)
    return _floats(block, kind)


def _floats(block: np.ndarray[Any, Any], kind: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(dequantize(block, kind), dtype=np.float32))
