"""Traces the steps of a decoder's answers, and keeps them in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import ValidationError

from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.models.transformers_config import not_installed
from tightfit.profiles.sources.prepared import load_prepared
from tightfit.profiles.steps.answer_tracing import traced_answers
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.files import cache_directory, write_whole
from tightfit.runtime.common.interpreter import PACKAGE
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP

CODE = ("profiles/models", "profiles/tracing", "profiles/schema.py", "runtime/engine/cpu/operators.py")
"""Source files that determine the steps: a change in any of them invalidates the cached ones."""
TRAINED_FOR = "original_max_position_embeddings"
"""Config field: longer sequences have rotary frequencies of their own (longrope)."""


def traced_steps(source: Source, longest: int, instead: str) -> AnswerSteps:
    """The steps of a model's decoder for answers of up to `longest` tokens with what was asked.

    Raises InputError for a decoder that cannot answer with a cache, which ends with `instead`: what to do.
    """
    if source.kind == "prepared" and (answers := load_prepared(source.path).answers) is not None:
        return answers
    by_hand = handwritten(source.config)
    try:
        releases = [version(name) for name in ("torch", *["transformers"] * (not by_hand))]
    except PackageNotFoundError as error:
        raise not_installed(source.config.get("model_type")) from error
    longer = [longest > length for length in _lengths(source.config)]
    code = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for name in CODE
        for path in ([PACKAGE / name] if (PACKAGE / name).is_file() else sorted((PACKAGE / name).rglob("*.py")))
    ]
    told = json.dumps([releases, source.config, longer, GROUP, code], sort_keys=True, default=str)
    place = cache_directory() / "generation" / f"steps-{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"
    try:
        return AnswerSteps.model_validate_json(place.read_bytes())
    except FileNotFoundError:
        pass
    except ValidationError:
        place.unlink(missing_ok=True)
    steps = traced_answers(source, GROUP, longest, instead)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, steps.model_dump_json())
    return steps


def _lengths(config: Any) -> Iterator[int]:
    """The lengths in a config up to which a model was trained first, in order."""
    if not isinstance(config, dict):
        return
    for key, value in sorted(config.items()):
        if key == TRAINED_FOR and isinstance(value, int):
            yield value
        yield from _lengths(value)
