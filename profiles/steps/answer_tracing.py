"""Traces the steps of a decoder's answers, in a process of its own where this one has not loaded PyTorch."""

from __future__ import annotations

import os
import sys
from typing import Any

from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.schema import FrozenRecord
from tightfit.profiles.sources.described import SourceDescription, described, described_source
from tightfit.profiles.steps.tracing_process import TRANSFORMERS_BYTES
from tightfit.profiles.weights.source import Source
from tightfit.profiles.worker_process import Progress, run_worker, work
from tightfit.runtime.common.interpreter import command, python_path

FAMILY_BYTES = 272 << 20
"""what the worker holds at most for a hand-written family: 253 MiB of Gemma 3's with 4 B parameters"""


class AnswersRequest(FrozenRecord):
    """A decoder, the tokens of a group, the most tokens of a prompt with its answer, and what to do where it cannot answer."""

    source: SourceDescription
    group: int
    longest: int
    instead: str


def traced_answers(source: Source, group: int, longest: int, instead: str) -> AnswerSteps:
    """The steps of one token and of `group` tokens of a decoder whose prompts and answers have up to `longest`.

    Raises InputError for a decoder that cannot answer with a cache, which ends with `instead`: what to do.
    """
    if "torch" in sys.modules:
        return _traced(source, group, longest, instead)
    request = AnswersRequest(source=described(source), group=group, longest=longest, instead=instead)
    result = run_worker(
        command(__name__),
        request.model_dump(mode="json"),
        os.environ | {"PYTHONPATH": python_path()},
        doing="tracing",
        predicted_bytes=FAMILY_BYTES if handwritten(source.config) else TRANSFORMERS_BYTES,
        instead="prepare the model on a machine with more memory (`tightfit prepare --weights`) and ask the folder",
    )
    return AnswerSteps.model_validate(result)


def _traced(source: Source, group: int, longest: int, instead: str) -> AnswerSteps:
    if handwritten(source.config):
        from tightfit.profiles.models.answering_family import family_steps

        return family_steps(source.config, group)
    from tightfit.profiles.models.answering_decoder import answer_steps

    return answer_steps(source.config, source.entries, group=group, longest=longest, instead=instead)


def _trace(values: dict[str, Any], report: Progress) -> dict[str, Any]:
    request = AnswersRequest.model_validate(values)
    steps = _traced(described_source(request.source), request.group, request.longest, request.instead)
    return steps.model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(work(_trace))
