"""Where a model comes from: a Hugging Face directory or hub id, a GGUF file, a bare config.json, or `module:factory`.

PyTorch is imported by what reads or makes tensors only: the process that prepares a run asks for the `vocabulary` alone.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from profiles.decoder_config import text_config
from profiles.errors import InputError
from profiles.layout import Entry
from profiles.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from profiles.describe import EmbeddingFormat

Kind = Literal["directory", "gguf", "config", "factory", "hub"]
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
FORMS = "a Hugging Face directory or hub id, a GGUF file, a config.json, or package.module:factory"
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """A tensor that is read when asked."""

    entry: Entry
    rows: Callable[[int, int], Tensor]
    """rows(start, stop): floats [stop - start, ...], or uint8 [stop - start, row bytes] that is packed already."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model before it is packed. Nothing but headers has been read."""

    name: str
    kind: str
    """huggingface, gguf, random or module."""
    path: str
    """What the user named, made absolute where it is a path."""
    config: dict[str, Any]
    """Hugging Face style, with model_type; for a module: {"factory": "package.module:factory",
    "state_dict": {key of its state_dict: name of the stored tensor}}."""
    fingerprint: str
    """sha256 that changes when the weights may have changed, or how they are packed."""
    has_weights: bool
    entries: dict[str, Entry]
    """Every tensor with its packed format; offsets are 0."""
    tensors: Callable[[], Iterable[SourceTensor]]
    """The same tensors in the same order, with their data."""
    note: str = ""
    """In words: what packing does to the weights' values."""


def resolve(source: str, *, embedding: EmbeddingFormat = "q4", seed: int = 0) -> Source:
    """Find out what `source` names and read its headers. Raises InputError where it names nothing usable.

    `embedding` is the format of embeddings that are not quantised yet; `seed` draws random weights of a bare config.
    """
    kind, path = _named(source)
    if kind == "directory":
        from profiles.huggingface import directory_source

        return directory_source(path, embedding=embedding)
    if kind == "hub":
        from profiles.huggingface import directory_source

        return directory_source(hub_directory(source), embedding=embedding, name=source)
    if kind == "gguf":
        from profiles.gguf_source import gguf_source

        return gguf_source(path)
    if kind == "config":
        from profiles.random_source import random_source

        return random_source(read_config(path), path, embedding=embedding, seed=seed)
    from profiles.factory_source import factory_source

    return factory_source(source)


def vocabulary(source: str) -> Vocabulary | None:
    """The tokenizer of what `source` names; None where it has none. Raises InputError where it names nothing or is damaged."""
    kind, path = _named(source)
    if kind == "gguf":
        from profiles.gguf_tokenizer import gguf_vocabulary

        return gguf_vocabulary(path)
    if kind in ("directory", "hub"):
        from profiles.directory_tokenizer import directory_vocabulary

        return directory_vocabulary(path if kind == "directory" else hub_directory(source))
    return None


def hub_directory(name: str) -> Path:
    """Download a model from the hub into its own cache. Raises InputError without huggingface_hub or the model."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{name}: no such directory; for a Hugging Face hub id run pip install 'tightfit[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # network, authorisation, unknown name: the library's classes vary by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: no such directory, and the Hugging Face hub answered: {reason}; check the name and the network"
        ) from error


def _named(source: str) -> tuple[Kind, Path]:
    """What `source` names, and where that lies if it is here. Raises InputError where it names nothing usable."""
    path = Path(source).expanduser()
    if path.is_dir():
        return "directory", path.resolve()
    if path.is_file():
        if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
            return "gguf", path.resolve()
        if path.suffix == ".json":
            return "config", path.resolve()
        raise InputError(f"{source}: neither a GGUF file nor a config.json; a model is {FORMS}")
    if _FACTORY.fullmatch(source):
        return "factory", path
    if _HUB.fullmatch(source) and path.suffix != ".gguf":
        return "hub", path
    raise InputError(f"{source}: no such file or directory; a model is {FORMS}")


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json; a multimodal wrapper gives the text model's config."""
    try:
        read: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a model directory needs a config.json") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); download the file again") from error
    config = text_config(read)
    if config is None:
        raise InputError(f"{path}: not a model config (no 'model_type'); a model is {FORMS}")
    return config


def without_names(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config decides what is stored: a store does not change with the names of an adapter."""
    return {key: value for key, value in config.items() if key != "adapter_body"}


def load_factory(source: str) -> Callable[..., Any]:
    """Import ``package.module:factory``. Raises InputError naming what is missing, and where it was looked for.

    The working folder comes last on this process's path from now on, so that nothing in it stands in for a package that is
    installed, or for one of ours; a module may import its neighbours when it is called, too.
    """
    module_name, _, attribute = source.partition(":")
    folder = _working_folder(source)
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # it may have been written a moment ago
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{source}: {_not_found(error, module_name, folder)}") from error
    except Exception as error:
        raise InputError(f"{source}: importing {module_name!r} raised {type(error).__name__}: {error}") from error
    factory: Callable[..., Any] | None = getattr(module, attribute, None)
    if factory is None or not callable(factory):
        raise InputError(
            f"{source}: module {module_name!r} has no function {attribute!r}; the module is {_place(module)}"
        )
    return factory


def _working_folder(source: str) -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError as error:
        raise InputError(
            f"{source}: the working folder, in which a module is looked for, was removed; enter another"
        ) from error


def _not_found(error: ModuleNotFoundError, module_name: str, folder: str) -> str:
    """What to do about a module that was not found on the way to `module_name`."""
    missing = error.name or ""
    if not f"{module_name}.".startswith(f"{missing}."):
        return f"importing {module_name!r} needs {missing!r}, which is not installed and not in {folder}; install it"
    package = sys.modules.get(missing.rpartition(".")[0])
    if package is not None and not Path(_place(package)).is_relative_to(folder):
        return (
            f"{error} in the package at {_place(package)}, which comes before the working folder {folder}; rename yours"
        )
    return f"{error}; it is not installed and not in the working folder {folder}; run from the folder that holds it"


def _place(module: ModuleType) -> str:
    """The file of a module, or the folder of a package that has none."""
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "Python's own")


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; check its permissions") from error
