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
from tightfit.profiles.weights.precision import DEFAULT, PUBLISHED, Precision, SourceMatrix, check_choice, rounding_note
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


class GgufReader(gguf.GGUFReader):
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
        reader = GgufReader(path)
    except Exception as error:  # a damaged file makes the reader raise all kinds of errors
        raise InputError(
            f"{path}: not a readable GGUF file ({error}); it is truncated or damaged, download it again"
        ) from error
    if metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{path}: one of {metadata['split.count']} parts; join them with llama.cpp's gguf-split --merge"
        )
    tensors_in_file = {tensor.name: tensor for tensor in reader.tensors}
    try:
        if "token_embd.weight" not in tensors_in_file:
            raise InputError("no tensor 'token_embd.weight'; only language models can be used")
        factors = tensors_in_file.pop("rope_freqs.weight", None)
        config = config_from_metadata(
            metadata,
            vocabulary=int(tensors_in_file["token_embd.weight"].shape[1]),
            tied="output.weight" not in tensors_in_file,
            rope_factors=None if factors is None else torch.tensor(factors.data, dtype=torch.float32),
        )
        pairs = _match(config, tensors_in_file, precision)
        matrices = [
            SourceMatrix(entry, tensor.tensor_type.name, entry.name in EMBEDDINGS)
            for entry, tensor in pairs
            if len(entry.shape) > 1
        ]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    check_choice(path, precision, matrices)
    stat = path.stat()
    with path.open("rb") as file:
        header_digest = hashlib.sha256(file.read(int(reader.data_offset)))
    formats = [entry.format for entry, _ in pairs]
    text = json.dumps([VERSION, "gguf", header_digest.hexdigest(), stat.st_size, stat.st_mtime_ns, formats])

    def tensors() -> Iterable[SourceTensor]:
        for entry, tensor in pairs:
            rows = _row_reader(path, config, entry, tensor)
            stored = StoredTensor(key=tensor.name, dtype=tensor.tensor_type.name)
            yield SourceTensor(entry=entry, rows=rows, origin=f"{path}: tensor {tensor.name!r}", stored=stored)

    return Source(
        name=path.stem,
        kind="gguf",
        path=str(path),
        config=config,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        has_weights=True,
        entries={entry.name: entry for entry, _ in pairs},
        tensors=tensors,
        note=rounding_note(matrices),
        base=precision.base,
        embeddings=precision.embeddings,
    )


def unpermuted_rows(rows: int, heads: int) -> Tensor:
    """For each row of Hugging Face's q or k, its row number in a GGUF file, int64 [rows].

    llama.cpp stores row h * d + 2 i + p for Hugging Face's h * d + p * d / 2 + i (d rows per head, p in {0, 1}).
    """
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _match(config: dict[str, Any], tensors_in_file: dict[str, Any], precision: Precision) -> list[tuple[Entry, Any]]:
    """(entry, tensor in the file) for every tensor of the decoder. Raises InputError for missing or unexpected ones."""
    by_name = {_hugging_face_name(config, name): tensor for name, tensor in tensors_in_file.items()}
    decoder = decoder_shape(_with_biases(config, by_name))
    quantised = any(tensor.tensor_type.name not in PUBLISHED for tensor in by_name.values())
    pairs = []
    for name, size in decoder_tensors(decoder):
        tensor = by_name.pop(name, None)
        if tensor is None:
            raise InputError(f"no tensor for {name!r}; the file is incomplete, convert the model again")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != size:
            raise InputError(
                f"tensor {tensor.name!r} has shape {list(shape)} where {list(size)} is due; the file's metadata does not fit its weights"
            )
        kind = tensor.tensor_type.name
        if len(size) == 1:
            entry = packed_entry(name, size, "float32")
        elif kind in KEPT:
            packed_format, group = KEPT[kind]
            entry = Entry(name=name, shape=size, format=packed_format, group=group)
        elif kind in PUBLISHED:
            packed_format = precision.format(PUBLISHED[kind], embedding=name in EMBEDDINGS, beside_quantised=quantised)
            entry = packed_entry(name, size, packed_format)
        else:
            entry = Entry(name=name, shape=size, format=UNPACKED)
        pairs.append((entry, tensor))
    if by_name:
        raise InputError(
            f"tensor {next(iter(by_name.values())).name!r} belongs to no {config['model_type']} decoder; this variant is not supported"
        )
    return pairs


def _with_biases(config: dict[str, Any], by_name: dict[str, Any]) -> dict[str, Any]:
    """The config, completed by whether the model has biases: GGUF metadata do not say so, but the tensors show it."""
    query_bias = "model.layers.0.self_attn.q_proj.bias" in by_name
    config["attention_bias"] = query_bias and not family_of(config).always_biased
    config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in by_name
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
    data = np.asarray(tensor.data)

    def rows(start: int, stop: int) -> Tensor:
        if len(entry.shape) == 1:
            vector = torch.from_numpy(np.array(dequantize(data, kind), dtype=np.float32))
            return (vector if order is None else vector[torch.from_numpy(order)]) - shift
        block = np.array(data[start:stop] if order is None else data[order[start:stop]])
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
