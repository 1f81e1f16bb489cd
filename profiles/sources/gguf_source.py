"""Opens models in GGUF files.

Quantised values are kept, code for code: Q4_0, Q4_1 and Q8_0 in the store's own groups, Q5_0, Q5_1 and K-quants in
blocks as they are in the file. Types that the store has no form of (IQ4_XS, MXFP4 and others) are unpacked to bfloat16,
which rounds as unpacking them in a step would. Matrices in F16, BF16 and F32 get the precision that is asked for.
llama.cpp permutes the rows of Llama's q and k for its interleaved rotary embedding; they are put back into Hugging
Face's half-split order. GGUF files hold Gemma's norm weights with 1 added; it is subtracted again.
`tightfit.profiles.sources.gguf_rows` reads the rows; here only the header is read, without PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.models.family import GgufFacts, family_of
from tightfit.profiles.sources.gguf_config import config_from_metadata
from tightfit.profiles.sources.gguf_metadata import GgufEntry, read_header
from tightfit.profiles.weights.describe import EMBEDDINGS, decoder_tensors, expert_parts, packed_entry
from tightfit.profiles.weights.precision import DEFAULT, PUBLISHED, Precision, SourceMatrix, check_choice, rounding_note
from tightfit.profiles.weights.source import Source, SourceTensor, StoredTensor
from tightfit.profiles.weights.tensor_file import PIECE, FileParts
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import BLOCKS, VERSION, Entry

KEPT = {"Q4_0": ("q4", 32), "Q4_1": ("q4", 32), "Q8_0": ("q8", 32)} | {
    kind.upper(): (kind, elements) for kind, (elements, _) in BLOCKS.items()
}
"""Format and group in the store of the types whose codes are kept."""
PLAIN = ("F32", "F16", "BF16")
"""Types that PyTorch reads; of all others the gguf package unpacks the blocks, with NumPy."""
MIXED = "mixed"
"""what stands for the type of tensors of several types that make one matrix"""
UNPACKED = "bfloat16"
"""Format of matrices in any other quantised type."""
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def gguf_source(path: Path, *, precision: Precision = DEFAULT) -> Source:
    """The model in a GGUF file; `precision` is that of matrices which the file does not hold quantised.

    Raises InputError if the file is damaged, split, or of an unsupported architecture, and if no matrix of it can have
    the precision.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{path}: one of {metadata['split.count']} parts; join them with llama.cpp's gguf-split --merge"
        )
    file = FileParts(path)
    tensors_in_file = {tensor.name: tensor for tensor in header.tensors}
    try:
        if "token_embd.weight" not in tensors_in_file:
            raise InputError("no tensor 'token_embd.weight'; only language models can be used")
        factors = tensors_in_file.pop("rope_freqs.weight", None)
        config = config_from_metadata(
            metadata,
            vocabulary=tensors_in_file["token_embd.weight"].shape[0],
            tied="output.weight" not in tensors_in_file,
            rope_factors=None if factors is None else _numbers(file, factors),
        )
        pairs = matched_tensors(config, tensors_in_file, precision)
        matrices = [
            SourceMatrix(entry, tensors[0].kind, entry.name in EMBEDDINGS)
            for entry, tensors in pairs
            if len(entry.shape) > 1
        ]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    check_choice(path, precision, matrices)
    stat = os.fstat(file.descriptor)
    header_digest = hashlib.sha256()
    for start in range(0, header.bytes, PIECE):
        header_digest.update(file.read(start, min(PIECE, header.bytes - start)))
    formats = [entry.format for entry, _ in pairs]
    text = json.dumps([VERSION, "gguf", header_digest.hexdigest(), stat.st_size, stat.st_mtime_ns, formats])

    def tensors() -> Iterable[SourceTensor]:
        from tightfit.profiles.sources.gguf_rows import interleaved_rows, row_reader

        facts = _facts(config)
        for entry, found in pairs:
            tensor, *others = found
            readers = [row_reader(file, one, entry, facts, config["head_dim"]) for one in found]
            rows = interleaved_rows(readers, tensor.shape[1]) if others else readers[0]
            stored = None if others else StoredTensor(key=tensor.name, dtype=tensor.kind)
            origins = [f"{path}: tensor {one.name!r}" for one in found] * (tensor.shape[0] if others else 1)
            yield SourceTensor(entry=entry, rows=rows, origins=origins, stored=stored)

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
        needs_numpy=any(tensor.kind not in (*KEPT, *PLAIN) for _, tensors in pairs for tensor in tensors),
    )


def _numbers(file: FileParts, tensor: GgufEntry) -> Sequence[float]:
    """The values of a small tensor."""
    letter = {"F32": "f", "F16": "e"}.get(tensor.kind)
    if letter is None:
        raise InputError(f"tensor {tensor.name!r} is {tensor.kind} where F32 is due; convert the model again")
    content = file.read(tensor.start, tensor.bytes)
    return [number for (number,) in struct.iter_unpack(f"<{letter}", content)]


def matched_tensors(
    config: dict[str, Any], tensors_in_file: dict[str, GgufEntry], precision: Precision
) -> list[tuple[Entry, list[GgufEntry]]]:
    """(entry, tensors in the file that it is made of) for every tensor of the decoder: one, but for gates and ups of
    experts, which are two. Raises InputError for missing or unexpected ones.
    """
    by_name = {_hugging_face_name(config, name): tensor for name, tensor in tensors_in_file.items()}
    decoder = decoder_shape(_with_biases(config, by_name))
    quantised = any(tensor.kind not in PUBLISHED for tensor in by_name.values())
    pairs: list[tuple[Entry, list[GgufEntry]]] = []
    for name, size in decoder_tensors(decoder):
        names = [part.replace(".*", "") for part in expert_parts(name)] or [name]
        tensors = [by_name.pop(one, None) for one in names]
        found = [tensor for tensor in tensors if tensor is not None]
        if len(found) < len(names):
            raise InputError(
                f"no tensor for {names[tensors.index(None)]!r}; the file is incomplete, convert the model again"
            )
        due = size if not expert_parts(name) else (decoder.experts, size[0] // len(names) // decoder.experts, size[1])
        for tensor in found:
            if tensor.shape != due:
                raise InputError(
                    f"tensor {tensor.name!r} has shape {list(tensor.shape)} where {list(due)} is due; the file's"
                    " metadata does not fit its weights"
                )
        kind = found[0].kind if len({tensor.kind for tensor in found}) == 1 else MIXED
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
        pairs.append((entry, found))
    if by_name:
        raise InputError(
            f"tensor {next(iter(by_name.values())).name!r} belongs to no {config['model_type']} decoder; this variant"
            " is not supported"
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
