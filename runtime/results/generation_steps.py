"""Traces the steps of a decoder's answers, and keeps them in the cache."""

from __future__ import annotations

import hashlib
from importlib.metadata import version

from tightfit.profiles.models.answer_steps import Answers
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.steps.tracing_process import traced_answers
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.cache import cache_place, keep, kept
from tightfit.runtime.common.interpreter import PACKAGE

CODE = (
    "profiles/models", "profiles/steps/answer_tracing.py", "profiles/tracing", "profiles/schema.py",
    "runtime/engine/cpu/cached_attention_sizes.py", "runtime/engine/cpu/operators.py",
)  # fmt: skip
"""Source files that determine the steps: a change in any of them invalidates the cached ones."""


def answers_of(source: Source) -> Answers:
    """The steps of the answers of a model's decoder, traced now unless they are kept."""
    releases = [version(name) for name in ("torch", *["transformers"] * (not handwritten(source.config)))]
    code = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for name in CODE
        for path in ([PACKAGE / name] if (PACKAGE / name).is_file() else sorted((PACKAGE / name).rglob("*.py")))
    ]
    place = cache_place("generation/steps", releases, source.config, code)
    answers = kept(place, Answers.model_validate_json)
    if answers is None:
        answers = traced_answers(source)
        keep(place, answers.model_dump_json())
    return answers
