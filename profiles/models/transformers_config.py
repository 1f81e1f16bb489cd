"""What a config says about the decoder that transformers would build, read without importing transformers or PyTorch:
whether transformers is here and knows the model, and what is refused by the config alone.

The service checks configs that clients send with it. What only the built model shows is refused by the process that
builds it (`tightfit.profiles.models.transformers_decoder`), in the same words.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tightfit.profiles.models.decoder_config import check_sizes
from tightfit.profiles.models.family import families
from tightfit.runtime.common.errors import InputError, TightfitError

INSTALL = "pip install 'tightfit[hf]'"
NAMES = Path("models") / "auto" / "modeling_auto.py"
"""The file of transformers that lists its models by ``model_type``."""
DECODERS, TWO_SEQUENCES = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
"""Its lists of decoders and of encoder-decoder models."""
FLOAT, FLOATS = "__float__", {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""How transformers writes numbers that JSON does not have: an object with this one key."""
MOST_WORDS = 600
"""letters of an error of transformers that are repeated"""


def check(config: Mapping[str, Any]) -> None:
    """Raises InputError for a config from which transformers is sure to build no dense decoder, or if transformers is
    not installed. Nothing is imported.
    """
    name = config.get("model_type")
    refuse_by_config(config)
    place = _installed()
    if place is None:
        raise not_installed(name)
    known = listed(place / NAMES)
    if known:
        refuse_by_name(name, known[DECODERS], known[TWO_SEQUENCES], _version())


def refuse_by_config(config: Mapping[str, Any]) -> None:
    """Raises InputError for encoder-decoder models and sizes that are out of bounds."""
    name = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise encoder_decoder(name)
    check_sizes(config)


def refuse_by_name(name: Any, decoders: Mapping[str, Any], two_sequences: Mapping[str, Any], release: str) -> None:
    """Raises InputError for a ``model_type`` that is none of transformers' `decoders`. The arguments map the names that
    the version `release` of transformers knows to classes.
    """
    if name in decoders:
        return
    if name in two_sequences:
        raise encoder_decoder(name)
    raise InputError(
        f"model_type {name!r} is no decoder of transformers {release} (AutoModelForCausalLM);"
        " check the config.json, or install a newer transformers"
    )


def settings_of(config: Any) -> Any:
    """A parsed config with the floats that transformers writes as objects in their places."""
    if isinstance(config, Mapping):
        written = config.get(FLOAT) if len(config) == 1 else None
        if isinstance(written, str) and written in FLOATS:
            return FLOATS[written]
        return {key: settings_of(value) for key, value in config.items()}
    return [settings_of(value) for value in config] if isinstance(config, list) else config


@contextmanager
def refused_in_its_words(name: Any) -> Iterator[None]:
    """While entered, whatever transformers raises on the config of a model is an InputError with its words, in one
    line.
    """
    try:
        yield
    except TightfitError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        if len(words) > MOST_WORDS:
            words = f"{words[:MOST_WORDS]} …"
        said = words if words and isinstance(error, ValueError) else f"{type(error).__name__}: {words}".rstrip(": ")
        raise InputError(
            f"transformers cannot build the {name!r} model of this config: {said}; check the config.json"
        ) from error


def encoder_decoder(name: Any) -> InputError:
    return InputError(
        f"model_type {name!r} is an encoder-decoder model: its loss is that of a second sequence, and a step of"
        " tightfit has one; use a decoder (a model for AutoModelForCausalLM)"
    )


def experts(name: Any, found: str) -> InputError:
    return InputError(
        f"model_type {name!r} is a mixture of experts whose {found} computes something else than the gated MLPs that"
        " are supported, activation(gate) * up or those of gpt-oss; use another model"
    )


def not_installed(name: Any) -> InputError:
    return InputError(
        f"model_type {name!r} is not one of {', '.join(families())}; for any other decoder run {INSTALL},"
        " or take a bundle of the model (`--bundle FOLDER`, or `--server URL`)"
    )


@functools.cache
def listed(file: Path) -> dict[str, dict[str, Any]]:
    """transformers' lists `DECODERS` and `TWO_SEQUENCES`, from ``model_type`` to the name of a class, as its source has
    them; empty if they are not written there as expected, and only the process that imports them can tell.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        for node in ast.parse(file.read_bytes()).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Name) and target.id in (DECODERS, TWO_SEQUENCES):
                assert isinstance(node, ast.Assign)
                assert isinstance(node.value, ast.Call)
                found[target.id] = dict(ast.literal_eval(node.value.args[0]))
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, AssertionError):
        return {}
    return found if len(found) == 2 else {}


def _installed() -> Path | None:
    """The folder of the installed transformers, None if there is none."""
    try:
        spec = importlib.util.find_spec("transformers")
    except ValueError:  # it is being imported, or stands for something else
        spec = None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _version() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "(of unknown version)"
