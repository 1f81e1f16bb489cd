"""Traces the steps of a decoder's answers, in this process."""

from __future__ import annotations

from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.sources.described import AnswersWanted
from tightfit.profiles.weights.source import Source


def trace_answers(source: Source, wanted: AnswersWanted) -> AnswerSteps:
    """The steps of a decoder's answers. Raises InputError for a decoder that cannot answer with a cache."""
    if handwritten(source.config):
        from tightfit.profiles.models.answering_family import family_steps

        return family_steps(source.config, wanted.group, wanted.instead)
    from tightfit.profiles.models.answering_decoder import answer_steps

    return answer_steps(
        source.config, source.entries, group=wanted.group, longest=wanted.longest, instead=wanted.instead
    )
