"""Opens decoders that are not written by hand: directories and bare configs whose tensors transformers names.

Matrices of linear layers and embeddings are rounded as the hand-written decoders' are; what else there is (norms,
biases, convolutions, rotary frequencies) is small and stays float32. Frequencies and other buffers that checkpoints do
not hold are computed from the config and packed beside the weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.models.decoder_config import initial_deviation
from tightfit.profiles.models.decoder_facts import DecoderFacts, FrozenTensor
from tightfit.profiles.sources.huggingface import (
    QUANTIZATION,
    OpenedFiles,
    checkpoint_files,
    checkpoint_keys,
    find_quantised,
    quantised_tensor,
    text_name,
)
from tightfit.profiles.sources.quantised import QuantisedMatrix, method_of
from tightfit.profiles.sources.stacked_experts import (
    dtype_of_parts,
    flattened_rows,
    mxfp4_parts,
    mxfp4_rows,
    parts_there,
    stacked_tensor,
    turned_rows,
)
from tightfit.profiles.weights.describe import packed_entry
from tightfit.profiles.weights.precision import DEFAULT, PUBLISHED, Precision, SourceMatrix, check_choice, rounding_note
from tightfit.profiles.weights.source import (
    Source,
    SourceTensor,
    StoredTensor,
    config_name,
    read_config,
    without_names,
)
from tightfit.profiles.weights.tensor_file import FileTensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import VERSION, Entry

if TYPE_CHECKING:
    from torch import Tensor

Rows = Callable[[int, int], "Tensor"]


def any_directory_source(
    path: Path, *, precision: Precision = DEFAULT, name: str | None = None, decoder: DecoderFacts | None = None
) -> Source:
    """The model in a directory with config.json and safetensors; arguments and errors as for
    `tightfit.profiles.sources.huggingface.directory_source`. Without `decoder`, what it consists of, transformers
    builds it.
    """
    config = read_config(path / "config.json")
    method = method_of(path, config)
    stated = config.pop(QUANTIZATION, None)
    digest = hashlib.sha256()
    keys = {file: checkpoint_keys(file, digest) for file in checkpoint_files(path)}
    decoder = decoder or built_decoder(config, spellings(keys.values()))
    locations: dict[str, tuple[Path, str]] = {}
    dtypes: dict[str, str] = {}
    for file, dtype_of in keys.items():
        for key, dtype in dtype_of.items():
            for own_name in (decoder.rename(text_name(key)), decoder.rename(key)):
                locations[own_name], dtypes[own_name] = (file, key), dtype
    opened = OpenedFiles(locations)
    coded = {tensor.key: mxfp4_parts(tensor.key, locations) for tensor in decoder.tensors if tensor.experts}
    apart = {tensor.key: parts_there(tensor.key, tensor.parts, tensor.experts, locations) for tensor in decoder.tensors}
    matrices = {tensor.key: tensor for tensor in decoder.tensors if tensor.role != "other"}
    quantised: dict[str, QuantisedMatrix] = {}
    if method is not None:
        shapes = {key: tensor.shape for key, tensor in matrices.items() if not (tensor.transposed or tensor.experts)}
        quantised = find_quantised(path, stated, locations, opened, shapes)
    direct: dict[str, tuple[Path, str]] = {}
    for tensor in decoder.tensors:
        if tensor.key in locations and tensor.key not in quantised and (tensor.value is None or tensor.persistent):
            file, key = direct[tensor.name] = locations[tensor.key]
            if dtypes[tensor.key] not in PUBLISHED:
                raise InputError(f"{file}: tensor {key!r} is {dtypes[tensor.key]}; use the model's 16-bit weights")
        elif coded.get(tensor.key):
            dtypes[tensor.key] = "MXFP4"
        elif names := apart[tensor.key]:
            dtypes[tensor.key] = dtype_of_parts(path, names, dtypes)
        elif tensor.value is None and tensor.key not in quantised:
            raise InputError(f"{path}: no tensor {tensor.key!r} in its safetensors files; download the model again")
    parts = frozenset[str]().union(*(matrix.parts for matrix in quantised.values()), *apart.values(), *coded.values())
    used = {key for _, key in direct.values()} | {locations[part][1] for part in parts}
    _check_known(path, config, decoder, {key for _, key in locations.values()} - used)
    entries = {
        tensor.name: (
            replace(quantised[tensor.key].entry, name=tensor.name)
            if tensor.key in quantised
            else (
                Entry(name=tensor.name, shape=tensor.shape, format="mxfp4", group=32)
                if coded.get(tensor.key)
                else _entry(
                    tensor,
                    precision,
                    PUBLISHED.get(dtypes.get(tensor.key, ""), ""),
                    beside_quantised=bool(quantised or any(coded.values())),
                )
            )
        )
        for tensor in decoder.tensors
    }
    packed_matrices = [
        SourceMatrix(
            entries[tensor.name],
            quantised[key].method if key in quantised else dtypes[key],
            tensor.role == "embedding",
        )
        for key, tensor in matrices.items()
        if key in quantised or tensor.name in direct or apart[key] or coded.get(key)
    ]
    check_choice(path, precision, packed_matrices)
    settings = [without_names(config), [[entry.name, entry.format, entry.group] for entry in entries.values()]]
    digest.update(json.dumps([VERSION, "transformers", *settings], sort_keys=True).encode())

    def tensors() -> Iterable[SourceTensor]:
        for tensor in decoder.tensors:
            entry = entries[tensor.name]
            if tensor.key in quantised:
                yield quantised_tensor(tensor.key, quantised[tensor.key], locations, opened, entry)
            elif codes := coded.get(tensor.key):
                blocks, scales = map(opened.tensor, codes)
                rows = mxfp4_rows(blocks, scales, tensor.experts, tensor.shape, in_turn=tensor.in_turn)
                yield SourceTensor(entry=entry, rows=rows, origin=f"{blocks.file.path}: tensor {blocks.name!r}")
            elif apart[tensor.key]:
                yield stacked_tensor(entry, apart[tensor.key], opened.tensor)
            elif tensor.name in direct:
                file, key = direct[tensor.name]
                rows = _file_rows(opened.tensor(tensor.key), tensor)
                stored = StoredTensor(key=key, dtype=dtypes[tensor.key], transposed=tensor.transposed)
                yield SourceTensor(entry=entry, rows=rows, origin=f"{file}: tensor {key!r}", stored=stored)
            else:
                yield SourceTensor(entry=entry, rows=_value_rows(tensor))

    return Source(
        name=name or path.name,
        kind="huggingface",
        path=str(path),
        config=config | decoder.config,
        fingerprint=digest.hexdigest(),
        has_weights=True,
        entries=entries,
        tensors=tensors,
        note=rounding_note(packed_matrices),
        base=precision.base,
        embeddings=precision.embeddings,
        decoder=decoder,
    )


def built_decoder(config: Mapping[str, Any], stored: Sequence[str]) -> DecoderFacts:
    """What a config's decoder consists of whose checkpoint has the names `stored`. Raises InputError for what
    transformers does not build, or where it is not installed.
    """
    from tightfit.profiles.models.transformers_decoder import facts

    return facts(config, stored)


def stored_names(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(config of the model in a directory, names of its tensors that have to be known to open it)."""
    config = read_config(path / "config.json")
    config.pop(QUANTIZATION, None)
    digest = hashlib.sha256()
    return config, spellings(checkpoint_keys(file, digest) for file in checkpoint_files(path))


def spellings(keys: Iterable[Iterable[str]]) -> list[str]:
    """The names of tensors in several files, and those without what wraps a text model."""
    return sorted({spelling for names in keys for name in names for spelling in (name, text_name(name))})


def any_random_source(
    config: dict[str, Any], path: Path, decoder: DecoderFacts, *, precision: Precision = DEFAULT, seed: int = 0
) -> Source:
    """A model of the config's sizes with random weights, drawn from `seed`; as
    `tightfit.profiles.sources.random_weights.random_source`.
    """
    deviation = initial_deviation(config)
    entries = {tensor.name: _entry(tensor, precision, "") for tensor in decoder.tensors}
    formats = {name: entry.format for name, entry in entries.items()}
    text = json.dumps([VERSION, "transformers random", without_names(config), formats, seed], sort_keys=True)

    def tensors() -> Iterable[SourceTensor]:
        for tensor in decoder.tensors:
            rows = _value_rows(tensor) if tensor.value is not None else _drawn_rows(tensor, deviation, seed)
            yield SourceTensor(entry=entries[tensor.name], rows=rows)

    return Source(
        name=config_name(path),
        kind="random",
        path=str(path),
        config=config | decoder.config,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        has_weights=False,
        entries=entries,
        tensors=tensors,
        note="random weights, for sizing only",
        base=precision.base,
        embeddings=precision.embeddings,
        decoder=decoder,
    )


def _entry(tensor: FrozenTensor, precision: Precision, dtype: str, *, beside_quantised: bool = False) -> Entry:
    """The store entry of a tensor that a file holds in `dtype`; `beside_quantised`: whether others there are
    quantised.
    """
    if tensor.role != "other":
        packed_format = precision.format(dtype, embedding=tensor.role == "embedding", beside_quantised=beside_quantised)
        return packed_entry(tensor.name, tensor.shape, packed_format)
    value = tensor.value
    return packed_entry(tensor.name, tensor.shape, "float32" if value is None or value.floating else value.dtype)


def _value_rows(tensor: FrozenTensor) -> Rows:
    assert tensor.value is not None
    matrix = tensor.value.matrix(tensor.shape[0] if len(tensor.shape) > 1 else 1)
    return lambda start, stop: matrix[start:stop].contiguous()


def _drawn_rows(tensor: FrozenTensor, deviation: float, seed: int) -> Rows:
    """Normally distributed rows around `tensor.mean`, the same whichever rows are asked for together."""
    columns = 1
    for size in tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape:
        columns *= size
    first_seed = int.from_bytes(hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()[:8], "little") >> 1

    def rows(start: int, stop: int) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(first_seed + start)
        return torch.randn(stop - start, columns, generator=generator) * deviation + tensor.mean

    return rows


def _file_rows(stored: FileTensor, tensor: FrozenTensor) -> Rows:
    """Rows of a tensor in a safetensors file; those of a transposed one are its columns there."""
    if tensor.experts and tensor.transposed:
        return turned_rows(stored, tensor.experts, tensor.shape, in_turn=tensor.in_turn)
    if tensor.experts:
        return flattened_rows(stored, tensor.experts, tensor.shape)
    expected = tensor.shape[::-1] if tensor.transposed else tensor.shape
    if stored.shape != expected:
        raise InputError(
            f"{stored.file.path}: tensor {stored.name!r} has shape {list(stored.shape)} where {list(expected)} is due;"
            " config.json does not fit the weights"
        )

    def rows(start: int, stop: int) -> Tensor:
        import torch

        if len(expected) < 2:
            rows_read = stored.whole()
        else:
            rows_read = stored.columns(start, stop).t() if tensor.transposed else stored.rows(start, stop)
        if tensor.in_turn:  # of a bias
            rows_read = torch.cat([rows_read[:, ::2], rows_read[:, 1::2]], dim=1)
        return rows_read.to(torch.float32).contiguous()

    return rows


def _check_known(path: Path, config: Mapping[str, Any], decoder: DecoderFacts, unused: Iterable[str]) -> None:
    """Raise InputError for tensors of a checkpoint in layers of the model that it does not use: leaving out a bias or a
    scale changes every result.
    """
    stems = {match[1] for tensor in decoder.tensors if (match := re.match(r"(.*?\.)\d+\.", tensor.key))}
    layers = int(decoder.config["num_hidden_layers"])
    for key in unused:
        own_name = decoder.rename(text_name(key))
        if key == own_name and not own_name.startswith(f"{decoder.prefix}."):
            own_name = f"{decoder.prefix}.{own_name}"  # of the body alone
        match = re.match(r"(.*?\.)(\d+)\.", own_name)
        if match is None or match[1] not in stems or int(match[2]) >= layers or key.endswith("inv_freq"):
            continue
        if not any(re.search(pattern, name) for pattern in decoder.unexpected for name in (key, own_name)):
            raise InputError(
                f"{path}: tensor {key!r} belongs to no {config['model_type']} decoder of this config.json; this variant"
                " is not supported"
            )
