"""Traces the steps of a decoder's answers, and keeps them in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.profiles.models.decoder_config import handwritten, telling_length
from tightfit.profiles.models.transformers_config import not_installed
from tightfit.profiles.sources.described import AnswersWanted, TracingRequest
from tightfit.profiles.sources.prepared import PreparedModel, load_prepared
from tightfit.profiles.steps.tracing_process import answers_request, traced_answers
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.files import cache_directory, kept, write_whole
from tightfit.runtime.common.interpreter import PACKAGE
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP

CODE = ("profiles/models", "profiles/tracing", "profiles/schema.py", "runtime/engine/cpu/operators.py")
"""Source files that determine the steps: a change in any of them invalidates the cached ones."""
Tracer = Callable[[TracingRequest], PreparedModel]
"""traces what is asked for on another machine"""


def traced_steps(source: Source, longest: int, instead: str, tracer: Tracer | None = None) -> AnswerSteps:
    """The steps of a model's decoder for answers of up to `longest` tokens with what was asked; traced by `tracer`, where there is one.

    Raises InputError for a decoder that cannot answer with a cache, which ends with `instead`: what to do.
    """
    if source.kind == "prepared" and (answers := load_prepared(source.path).answers) is not None:
        return answers
    wanted = AnswersWanted(group=GROUP, longest=telling_length(source.config, longest), instead=instead)
    if tracer is not None:
        traced = tracer(answers_request(source, wanted)).answers
        assert traced is not None
        return traced
    by_hand = handwritten(source.config)
    try:
        releases = [version(name) for name in ("torch", *["transformers"] * (not by_hand))]
    except PackageNotFoundError as error:
        raise not_installed(source.config.get("model_type")) from error
    code = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for name in CODE
        for path in ([PACKAGE / name] if (PACKAGE / name).is_file() else sorted((PACKAGE / name).rglob("*.py")))
    ]
    told = json.dumps([releases, source.config, wanted.longest, GROUP, code], sort_keys=True, default=str)
    place = cache_directory() / "generation" / f"steps-{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"
    steps = kept(place, AnswerSteps.model_validate_json)
    if steps is None:
        steps = traced_answers(source, wanted)
        write_whole(place, steps.model_dump_json())
    return steps
