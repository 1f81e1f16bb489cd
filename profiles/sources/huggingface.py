"""Opens models in Hugging Face directories (safetensors, one file or shards).

Matrices are rounded to the store's 4-bit or 8-bit groups when they are packed, or stay in 16 bits, as is asked for;
quantised ones keep their codes (`tightfit.profiles.sources.quantised`); vectors stay float32. Of a multimodal
Gemma 3 only the text model is used. Only the rows that are being packed are in memory. PyTorch is imported when rows
are read, not before.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.models.family import family_of
from tightfit.profiles.sources.quantised import QuantisedMatrix, find, method_of
from tightfit.profiles.sources.stacked_experts import dtype_of_parts, flattened_rows, parts_there, stacked_tensor
from tightfit.profiles.weights.describe import EMBEDDINGS, describe, expert_parts
from tightfit.profiles.weights.precision import DEFAULT, PUBLISHED, Precision, SourceMatrix, check_choice, rounding_note
from tightfit.profiles.weights.source import Source, SourceTensor, StoredTensor, read_config, without_names
from tightfit.profiles.weights.tensor_file import FileTensor, TensorFile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import read_json
from tightfit.runtime.engine.weights.layout import VERSION, Entry

if TYPE_CHECKING:
    from torch import Tensor

ADVICE = "it is truncated or damaged, download it again"
QUANTIZATION = "quantization_config"
CONVERSION = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('OLD').save_pretrained('NEW')\""
)
PREFIXES = (  # names of the text model inside a multimodal wrapper in transformers' versions -> its own names
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
BASE = re.compile(r"(?:language_model\.)?(?=(?:embed_tokens|layers|norm)\.)")
"""Beginning of names in a model that was saved without its head (AutoModel)."""


def directory_source(path: Path, *, precision: Precision = DEFAULT, name: str | None = None) -> Source:
    """The model in a directory with config.json and safetensors.

    `precision` is that of matrices which are not quantised yet; `name` replaces the directory's name. Raises
    InputError, naming the file or tensor at fault.
    """
    config = read_config(path / "config.json")
    method = method_of(path, config)
    files = checkpoint_files(path)
    locations: dict[str, tuple[Path, str]] = {}
    digest = hashlib.sha256()
    dtypes: dict[str, str] = {}
    for file in files:
        for key, dtype in checkpoint_keys(file, digest).items():
            locations[text_name(key)] = (file, key)
            dtypes[text_name(key)] = dtype
    # A model saved without its head is complete only if its family ties the head to the embedding by default.
    headless = any(BASE.match(key) for _, key in locations.values()) and not family_of(config).tied
    if "lm_head.weight" not in locations and "tie_word_embeddings" not in config and not headless:
        config["tie_word_embeddings"] = True
    opened = OpenedFiles(locations)
    quantised: dict[str, QuantisedMatrix] = {}
    stated = config.pop(QUANTIZATION, None)  # the store holds the codes in its own form
    described = [entry for entry in describe(config).values() if len(entry.shape) > 1]
    experts = decoder_shape(config).experts
    apart = {entry.name: parts_there(entry.name, expert_parts(entry.name), experts, locations) for entry in described}
    dtypes |= {matrix: dtype_of_parts(path, parts, dtypes) for matrix, parts in apart.items() if parts}
    if method is not None:
        shapes = {entry.name: entry.shape for entry in described if not expert_parts(entry.name)}
        quantised = find_quantised(path, stated, locations, opened, shapes)
    formats = {
        entry.name: precision.format(
            PUBLISHED.get(dtypes[entry.name], ""), embedding=entry.name in EMBEDDINGS, beside_quantised=bool(quantised)
        )
        for entry in described
        if entry.name in dtypes
    }
    entries = describe(config, precision=precision, formats=formats)
    entries |= {matrix.entry.name: matrix.entry for matrix in quantised.values()}
    for entry in entries.values():
        if entry.name not in locations and entry.name not in quantised and not apart.get(entry.name):
            advice = "download the model again"
            if entry.name == "lm_head.weight":
                advice = f"it was saved without its head: save it from AutoModelForCausalLM, or {advice}"
            raise InputError(f"{path}: no tensor {entry.name!r} in its safetensors files; {advice}")
    parts = frozenset[str]().union(*(matrix.parts for matrix in quantised.values()), *apart.values())
    _check_known(path, config, locations.keys() - parts, entries)
    dtypes |= {matrix.entry.name: matrix.method for matrix in quantised.values()}
    matrices = [
        SourceMatrix(entry, dtypes[entry.name], entry.name in EMBEDDINGS)
        for entry in entries.values()
        if len(entry.shape) > 1
    ]
    check_choice(path, precision, matrices)
    settings = [without_names(config), [[entry.name, entry.format, entry.group] for entry in entries.values()]]
    digest.update(json.dumps([VERSION, "huggingface", *settings], sort_keys=True).encode())

    def tensors() -> Iterable[SourceTensor]:
        for entry in entries.values():
            if entry.name in quantised:
                yield quantised_tensor(entry.name, quantised[entry.name], locations, opened, entry)
                continue
            if names := apart.get(entry.name):
                yield stacked_tensor(entry, names, opened.tensor)
                continue
            file, key = locations[entry.name]
            rows = _row_reader(opened.tensor(entry.name), entry, experts)
            stored = StoredTensor(key=key, dtype=dtypes[entry.name])
            yield SourceTensor(entry=entry, rows=rows, origin=f"{file}: tensor {key!r}", stored=stored)

    return Source(
        name=name or path.name,
        kind="huggingface",
        path=str(path),
        config=config,
        fingerprint=digest.hexdigest(),
        has_weights=True,
        entries=entries,
        tensors=tensors,
        note=rounding_note(matrices),
        base=precision.base,
        embeddings=precision.embeddings,
    )


class OpenedFiles:
    """The safetensors files of a checkpoint, each opened when one of its tensors is first asked for."""

    def __init__(self, locations: Mapping[str, tuple[Path, str]]) -> None:
        """`locations`: by its name in the model, each tensor's (file, name in it)."""
        self._locations = locations
        self._files: dict[Path, TensorFile] = {}

    def tensor(self, name: str) -> FileTensor:
        """The tensor `name`, of which rows are read when they are asked for."""
        file, key = self._locations[name]
        if file not in self._files:
            self._files[file] = TensorFile(file, ADVICE)
        return self._files[file].tensor(key)


def find_quantised(
    path: Path,
    stated: Mapping[str, Any],
    locations: Mapping[str, Any],
    opened: OpenedFiles,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, QuantisedMatrix]:
    """Those of the matrices `shapes` that the checkpoint in `path` holds quantised, by their names in `locations`.

    `stated` is the config's quantization_config. Raises InputError for parts that do not fit together.
    """
    try:
        matrices = {name: find(stated, locations, opened.tensor, name, shape) for name, shape in shapes.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return {name: matrix for name, matrix in matrices.items() if matrix is not None}


def quantised_tensor(
    name: str, matrix: QuantisedMatrix, locations: Mapping[str, tuple[Path, str]], opened: OpenedFiles, entry: Entry
) -> SourceTensor:
    """The matrix `name` of a checkpoint, to be packed as `entry`."""
    from tightfit.profiles.sources.quantised_rows import row_reader

    first = min(matrix.parts)
    file, key = locations[first]
    stored = StoredTensor(
        key=f"{key.removesuffix(first.removeprefix(name.removesuffix('weight')))}weight",
        dtype=matrix.method,
        parts=frozenset(locations[part][1] for part in matrix.parts),
    )
    description = f"{file}: tensor {name!r} ({matrix.method})"
    return SourceTensor(entry=entry, rows=row_reader(matrix, opened.tensor), origin=description, stored=stored)


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a directory. Raises InputError if one is missing."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: damaged ({error!r}); download the file again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"{index}: damaged ({name!r} is no file beside it); download the file again")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise InputError(
                f"{path}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); download the model again"
            )
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others
    pickled = sorted(path.glob("pytorch_model*.bin")) or sorted(path.glob("*.bin"))
    if pickled:
        raise InputError(
            f"{path}: {pickled[0].name} is a pickle, which runs code when it is read, and is not opened; convert it"
            f" where you trust it: {CONVERSION}"
        )
    raise InputError(
        f"{path}: no model.safetensors; save the model with save_pretrained(safe_serialization=True), or give"
        " config.json itself for random weights"
    )


def checkpoint_keys(file: Path, digest: Any) -> dict[str, str]:
    """Names of the tensors in a safetensors file, with their types.

    Adds its header, size and modification time to the fingerprint `digest`.
    """
    opened = TensorFile(file, ADVICE)
    digest.update(opened.header + struct.pack("<qq", opened.stat.st_size, opened.stat.st_mtime_ns))
    return {key: dtype for key, (dtype, _) in opened.tensors.items()}


def text_name(key: str) -> str:
    """The name of a checkpoint's tensor in the text model alone."""
    for prefix, replacement in PREFIXES:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return BASE.sub("model.", key, count=1) if BASE.match(key) else key


def _check_known(path: Path, config: dict[str, Any], names: Iterable[str], entries: Mapping[str, Entry]) -> None:
    """Raise InputError for tensors in layers that the decoder does not use: leaving out a bias or scale changes every
    result.
    """
    for name in names:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None or name in entries or name.endswith(".rotary_emb.inv_freq"):
            continue
        if int(layer[1]) < config["num_hidden_layers"]:
            raise InputError(
                f"{path}: tensor {name!r} belongs to no {config['model_type']} decoder of this config.json; this"
                " variant is not supported"
            )


def _row_reader(tensor: FileTensor, entry: Entry, experts: int) -> Callable[[int, int], Tensor]:
    if expert_parts(entry.name):
        return flattened_rows(tensor, experts, entry.shape)
    if tensor.shape != entry.shape:
        raise InputError(
            f"{tensor.file.path}: tensor {tensor.name!r} has shape {list(tensor.shape)} where {list(entry.shape)} is"
            " due; config.json does not fit the weights"
        )

    if tensor.dtype not in PUBLISHED:
        raise InputError(
            f"{tensor.file.path}: tensor {tensor.name!r} is {tensor.dtype}, and config.json states no quantisation that"
            " can be read; use the model's 16-bit weights or a GGUF file"
        )

    def rows(start: int, stop: int) -> Tensor:
        return (tensor.whole() if len(entry.shape) == 1 else tensor.rows(start, stop)).float()

    return rows
