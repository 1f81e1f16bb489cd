"""Opens models in Hugging Face directories (safetensors, one file or shards).

Matrices are rounded to the store's 4-bit (or 8-bit) groups when they are packed; vectors stay float32. Of a multimodal
Gemma 3 only the text model is used. Only the rows that are being packed are in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tightfit.profiles.models.family import family_of
from tightfit.profiles.weights.describe import EmbeddingFormat, describe
from tightfit.profiles.weights.source import Source, SourceTensor, read_config, without_names
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import VERSION, Entry

FLOATS = ("F64", "F32", "F16", "BF16")
PREFIXES = (  # names of the text model inside a multimodal wrapper in transformers' versions -> its own names
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
BASE = re.compile(r"(?:language_model\.)?(?=(?:embed_tokens|layers|norm)\.)")
"""Beginning of names in a model that was saved without its head (AutoModel)."""


def directory_source(path: Path, *, embedding: EmbeddingFormat, name: str | None = None) -> Source:
    """The model in a directory with config.json and safetensors.

    `embedding` is the format of the embedding and of an untied head; `name` replaces the directory's name. Raises
    InputError, naming the file or tensor at fault.
    """
    config = read_config(path / "config.json")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise InputError(
            f"{path}: weights already quantised ({method}) cannot be read; use the unquantised model or a GGUF file"
        )
    files = _files(path)
    held: dict[str, tuple[Path, str]] = {}
    stored = without_names(config)
    digest = hashlib.sha256(json.dumps([VERSION, "huggingface", stored, embedding], sort_keys=True).encode())
    for file in files:
        for key in _keys(file, digest):
            held[_text_name(key)] = (file, key)
    # A model saved without its head is complete only if its family ties the head to the embedding by default.
    bare = any(BASE.match(key) for _, key in held.values()) and not family_of(config).tied
    if "lm_head.weight" not in held and "tie_word_embeddings" not in config and not bare:
        config["tie_word_embeddings"] = True
    entries = describe(config, embedding=embedding)
    for entry in entries.values():
        if entry.name not in held:
            way = "download the model again"
            if entry.name == "lm_head.weight":
                way = f"it was saved without its head: save it from AutoModelForCausalLM, or {way}"
            raise InputError(f"{path}: no tensor {entry.name!r} in its safetensors files; {way}")
    _check_known(path, config, held, entries)

    def tensors() -> Iterable[SourceTensor]:
        opened: dict[Path, Any] = {}
        for entry in entries.values():
            file, key = held[entry.name]
            if file not in opened:
                opened[file] = safe_open(file, framework="pt")
            yield SourceTensor(entry=entry, rows=_row_reader(file, opened[file], key, entry))

    return Source(
        name=name or path.name,
        kind="huggingface",
        path=str(path),
        config=config,
        fingerprint=digest.hexdigest(),
        has_weights=True,
        entries=entries,
        tensors=tensors,
        note=f"matrices rounded to 4 bit in groups of 32, embeddings to {embedding[1:]} bit",
    )


def _files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
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
    found = "only pytorch .bin files" if any(path.glob("*.bin")) else "no model.safetensors"
    raise InputError(
        f"{path}: {found}; save the model with save_pretrained(safe_serialization=True), or give config.json itself for random weights"
    )


def _keys(file: Path, digest: Any) -> list[str]:
    """Names of the tensors in a safetensors file.

    Adds its header, size and modification time to the fingerprint `digest`.
    """
    try:
        with file.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            stat = file.stat()
            header = raw.read(min(length, stat.st_size))
        digest.update(header + struct.pack("<qq", stat.st_size, stat.st_mtime_ns))
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, struct.error, SafetensorError) as error:
        raise InputError(
            f"{file}: not a readable safetensors file ({error}); it is truncated or damaged, download it again"
        ) from error


def _text_name(key: str) -> str:
    for prefix, replacement in PREFIXES:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return BASE.sub("model.", key, count=1) if BASE.match(key) else key


def _check_known(path: Path, config: dict[str, Any], held: Iterable[str], entries: Mapping[str, Entry]) -> None:
    """Raise InputError for tensors in layers that the decoder does not use: leaving out a bias or scale changes every
    result.
    """
    for name in held:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None or name in entries or name.endswith(".rotary_emb.inv_freq"):
            continue
        if int(layer[1]) < config["num_hidden_layers"]:
            raise InputError(
                f"{path}: tensor {name!r} belongs to no {config['model_type']} decoder of this config.json; this variant is not supported"
            )


def _row_reader(file: Path, opened: Any, key: str, entry: Entry) -> Callable[[int, int], Tensor]:
    data = opened.get_slice(key)
    if tuple(data.get_shape()) != entry.shape:
        raise InputError(
            f"{file}: tensor {key!r} has shape {data.get_shape()} where {list(entry.shape)} is due; config.json does not fit the weights"
        )

    if data.get_dtype() not in FLOATS:
        raise InputError(
            f"{file}: tensor {key!r} is {data.get_dtype()}: weights already quantised cannot be read; use the unquantised model or a GGUF file"
        )

    def rows(start: int, stop: int) -> Tensor:
        part: Tensor = data[:] if len(entry.shape) == 1 else data[start:stop]
        return part.to(torch.float32)

    return rows
