"""Traces the steps of a decoder's answers, in this process."""

from __future__ import annotations

from tightfit.profiles.models.answer_steps import Answers
from tightfit.profiles.models.decoder_config import first_lengths, handwritten
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP


def trace_answers(source: Source) -> Answers:
    """The steps of a decoder's answers, or why it cannot answer with a cache."""
    config = source.config
    try:
        if handwritten(config):
            from tightfit.profiles.models.answering_family import family_steps

            return Answers(steps={0: family_steps(config, GROUP)})
        from tightfit.profiles.models.answering_decoder import answer_steps

        fewest = {0, *(length + 1 for length in first_lengths(config))}
        return Answers(
            steps={
                tokens: answer_steps(config, source.entries, group=GROUP, longest=tokens) for tokens in sorted(fewest)
            }
        )
    except InputError as error:
        return Answers(steps={}, refused=str(error))
