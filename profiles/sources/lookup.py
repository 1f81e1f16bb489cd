"""Recognises what a user's MODEL argument names (directory, hub id, GGUF file, config.json, `module:factory`) and opens
it.

PyTorch is imported only by functions that read or make tensors: the process that prepares a run asks for the
`vocabulary` alone and does without.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.sources.tokenizer_file import TokenizerFile
from tightfit.profiles.sources.vocabulary import TOKENIZER, WORDS, Vocabulary
from tightfit.profiles.weights.source import BUNDLE, FORMS, Source, config_name, read_config
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import JsonError, read_json

if TYPE_CHECKING:
    from tightfit.profiles.models.decoder_facts import DecoderFacts
    from tightfit.profiles.sources.bundle import Bundle, BundleRequest
    from tightfit.profiles.weights.precision import Precision

Kind = Literal["directory", "bundle", "gguf", "config", "factory", "hub"]
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
POSITIONS = ("max_position_embeddings", "n_positions")
"""What a config.json calls the number of positions, the second in families such as GPT-2."""
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    source: str | os.PathLike[str],
    *,
    base: str | None = None,
    embeddings: str | None = None,
    seed: int = 0,
    decoder: DecoderFacts | None = None,
) -> Source:
    """Find out what `source` names and read its headers. Raises InputError if it names nothing usable.

    `base` and `embeddings` are 4bit, 8bit or 16bit, for matrices that are not quantised yet and for the embedding and
    the head among them (`tightfit.profiles.weights.precision.Precision`); `seed` is that of a bare config's random
    weights and of a factory's initial ones. `decoder` is what a decoder that transformers builds consists of, where
    that is known: transformers is not needed then.
    """
    from tightfit.profiles.weights.precision import precision

    bits = precision(base, embeddings)
    kind, path = _named(source)
    if kind == "bundle":
        from tightfit.profiles.sources.bundle import Bundle

        return Bundle.load(path).source(path, base=base, embeddings=embeddings)
    if kind == "directory":
        return _directory(path, bits, None, decoder)
    if kind == "hub":
        return _directory(hub_directory(source), bits, os.fspath(source), decoder)
    if kind == "gguf":
        from tightfit.profiles.sources.gguf_source import gguf_source

        return gguf_source(path, precision=bits)
    if kind == "config":
        config = read_config(path)
        if not handwritten(config):
            from tightfit.profiles.sources.transformers_source import any_random_source, built_decoder

            return any_random_source(config, path, decoder or built_decoder(config, ()), precision=bits, seed=seed)
        from tightfit.profiles.sources.random_weights import random_source

        return random_source(config, path, precision=bits, seed=seed)
    from tightfit.profiles.sources.factory import factory_source

    _refuse_choice(os.fspath(source), bits)
    return factory_source(os.fspath(source))


def resolve_traced(
    source: str | os.PathLike[str],
    bundle: str | os.PathLike[str] | None,
    *,
    base: str | None = None,
    embeddings: str | None = None,
) -> tuple[Source, Bundle | None]:
    """The model that `source` names, and what was traced of it: the bundle that `source` itself is, or that lies in the
    folder `bundle`; None where neither is. Raises InputError for a bundle that was made for another model.
    """
    kind, path = _named(source)
    folder = path if kind == "bundle" and bundle is None else bundle
    if folder is None:
        return resolve(source, base=base, embeddings=embeddings), None
    from tightfit.profiles.sources.bundle import Bundle

    traced = Bundle.load(folder)
    if kind == "bundle":
        opened = traced.source(path, base=base, embeddings=embeddings)
    else:
        opened = resolve(source, base=base, embeddings=embeddings, decoder=traced.decoder)
        traced.check_config(opened.name, headers(source).config if traced.decoder else opened.config)
    return opened, traced


def headers(source: str | os.PathLike[str], *, base: str | None = None, embeddings: str | None = None) -> BundleRequest:
    """What a language model's headers say that has to be known to trace it elsewhere; builds no decoder. Raises
    InputError for a bundle, which is traced already.
    """
    from tightfit.profiles.sources.bundle import BundleRequest

    kind, path = _named(source)
    if kind == "bundle":
        raise InputError(f"{source} is a bundle already; name the model's own files")
    folder = hub_directory(source) if kind == "hub" else path
    if kind != "gguf":
        config = read_config(folder if kind == "config" else folder / "config.json")
        if not handwritten(config):
            from tightfit.profiles.sources.transformers_source import stored_names

            name = os.fspath(source) if kind == "hub" else config_name(path) if kind == "config" else path.name
            config, stored = (config, []) if kind == "config" else stored_names(folder)
            return BundleRequest(name=name, config=config, stored=stored)
    opened = resolve(source, base=base, embeddings=embeddings)
    return BundleRequest(name=opened.name, config=opened.config)


def _directory(path: Path, precision: Precision, name: str | None, decoder: DecoderFacts | None) -> Source:
    """The model in a Hugging Face directory: one of the decoders written by hand, or else any that transformers has."""
    if handwritten(read_config(path / "config.json")):
        from tightfit.profiles.sources.huggingface import directory_source

        return directory_source(path, precision=precision, name=name)
    from tightfit.profiles.sources.transformers_source import any_directory_source

    return any_directory_source(path, precision=precision, name=name, decoder=decoder)


def _refuse_choice(source: str, bits: Precision) -> None:
    """Raise InputError if a precision is named for a module of the user's own."""
    for option, value in vars(bits).items():
        if value is not None:
            raise InputError(
                f"{spelled(option)} {value}: {source} is a module, whose parameters stay float32; leave it out"
            )


def tokenizer_file(source: str | os.PathLike[str]) -> TokenizerFile | None:
    """Where the tokenizer of what `source` names lies; None if it has none. Raises InputError if it names nothing."""
    kind, path = _named(source)
    if kind == "gguf":
        return TokenizerFile(kind="gguf", path=str(path))
    if kind == "bundle":
        return TokenizerFile(kind="bundle", path=str(path)) if (path / WORDS).exists() else None
    if kind in ("directory", "hub"):
        path = path if kind == "directory" else hub_directory(source)
        return TokenizerFile(kind="directory", path=str(path)) if (path / TOKENIZER).exists() else None
    return None


def vocabulary(source: str | os.PathLike[str]) -> Vocabulary | None:
    """The tokenizer of what `source` names, loaded into this process; None if it has none.

    Raises InputError if it names nothing or is damaged.
    """
    file = tokenizer_file(source)
    return None if file is None else file.vocabulary()


def is_traced(source: str | os.PathLike[str], bundle: str | os.PathLike[str] | None) -> bool:
    """Whether `source` is a bundle, or `bundle` names one."""
    return bundle is not None or _named(source)[0] == "bundle"


def names_module(source: str | os.PathLike[str]) -> bool:
    """Whether `source` names a module of the user's own. Raises InputError if it names nothing usable."""
    return _named(source)[0] == "factory"


def traced_seq(source: str | os.PathLike[str], bundle: str | os.PathLike[str] | None) -> int | None:
    """Tokens of the step in the bundle that `source` is, or that lies in the folder `bundle`; None where neither is."""
    kind, path = _named(source)
    folder = path if kind == "bundle" and bundle is None else bundle
    if folder is None:
        return None
    from tightfit.profiles.sources.bundle import Bundle

    return Bundle.load(folder).step.seq


def longest_sequence(source: str | os.PathLike[str]) -> int | None:
    """The number of positions that the model named by `source` was made for; None if its file does not say, and for a
    module. Imports no PyTorch.

    Raises InputError if `source` names nothing or is damaged.
    """
    kind, path = _named(source)
    if kind == "factory":
        return None
    if kind == "gguf":
        from tightfit.profiles.sources.gguf_metadata import read_metadata

        metadata = read_metadata(path)
        positions = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    elif kind == "bundle":
        positions = positions_of(_bundle_config(path))
    else:
        folder = hub_directory(source) if kind == "hub" else path
        config = read_config(folder if kind == "config" else folder / "config.json")
        positions = positions_of(config)
    return positions if isinstance(positions, int) and positions > 0 else None


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The number of positions that a decoder was made for, as its config says; None if it does not."""
    positions = next((config[name] for name in POSITIONS if config.get(name)), None)
    return positions if isinstance(positions, int) and positions > 0 else None


def end_tokens(source: str | os.PathLike[str]) -> list[int]:
    """The tokens that end an answer of the model named by `source`, as its generation_config.json, else its config.json
    says, or its GGUF file. Imports no PyTorch.

    Raises InputError if `source` names nothing or is damaged.
    """
    kind, path = _named(source)
    if kind == "factory":
        return []
    if kind == "gguf":
        from tightfit.profiles.sources.gguf_metadata import read_metadata

        metadata = read_metadata(path)
        ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        return [token for token in dict.fromkeys(ids) if isinstance(token, int)]
    folder = hub_directory(source) if kind == "hub" else path
    if kind == "bundle":
        return _token_ids(_bundle_config(folder).get("eos_token_id"))
    for file in (path,) if kind == "config" else (folder / "generation_config.json", folder / "config.json"):
        if file.exists():
            try:
                config = read_json(file)
            except OSError as error:
                raise InputError(f"{file}: {error.strerror}; download the file again") from error
            except JsonError as error:
                raise InputError(f"{file}: not JSON ({error}); download the file again") from error
            ends = _token_ids(config.get("eos_token_id") if isinstance(config, dict) else None)
            if ends:
                return ends
    return []


def _token_ids(stated: Any) -> list[int]:
    return [token for token in (stated if isinstance(stated, list) else [stated]) if isinstance(token, int)]


def _bundle_config(folder: Path) -> dict[str, Any]:
    from tightfit.profiles.sources.bundle import Bundle

    return Bundle.load(folder).request.config


def hub_directory(name: str | os.PathLike[str]) -> Path:
    """Download a model into huggingface_hub's own cache and return its directory.

    Raises InputError if huggingface_hub is not installed or the model cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{name}: no such directory; for a Hugging Face hub id run pip install 'tightfit[hub]'"
        ) from error
    try:
        return Path(snapshot_download(os.fspath(name), allow_patterns=HUB_FILES))
    except Exception as error:  # network, authorisation, unknown name: the classes vary by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: no such directory, and the Hugging Face hub answered: {reason}; check the name and the network"
        ) from error


def _named(source: str | os.PathLike[str]) -> tuple[Kind, Path]:
    """(kind of model that `source` names, its path if it is a local file).

    Raises InputError if it names nothing usable, or is no name but a module or a function.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"{_not_a_name(source)}; a model is {FORMS}")
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return "bundle" if (path / BUNDLE).is_file() else "directory", path.resolve()
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


def _not_a_name(value: Any) -> str:
    """What was given in the place of a model's name, and what to give instead."""
    kind, module_name = type(value), getattr(value, "__module__", "")
    if isinstance(value, type) or any(base.__name__ == "Module" for base in kind.__mro__):
        description = value.__qualname__ if isinstance(value, type) else f"a {kind.__qualname__}"
        return (
            f"{description} itself was given, and other processes have to make it: write a function without arguments"
            " that returns the module and a sample batch, and give its name, such as 'my_file:factory'"
        )
    if callable(value):
        name = f"{module_name}:{getattr(value, '__qualname__', '')}"
        name = name if _FACTORY.fullmatch(name) and module_name != "__main__" else "my_file:factory"
        return f"{value!r} itself was given, and other processes have to import it: give its name, such as {name!r}"
    return f"{value!r} is of type {kind.__name__}; give a name or a path"


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; check its permissions") from error
