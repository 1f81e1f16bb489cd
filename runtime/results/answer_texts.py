"""What answers need of a tokenizer, made by a worker that has ended before a model is loaded: the tokens of prompts,
the text of each token, and the tokens with which an answer ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.profiles.sources.tokenizer_file import TokenizerFile
from tightfit.profiles.sources.tokenizer_process import with_tokenizer, work_with_tokenizer
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.common.run_folder import writing_to
from tightfit.runtime.data.samples import Prompt
from tightfit.runtime.data.token_bytes import token_bytes
from tightfit.runtime.data.tokenization import Encoder
from tightfit.runtime.supervision.token_text import write_table

MODULE = "tightfit.runtime.results.answer_texts"
TABLE = "table"
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")
"""tokens with which chat templates of published models end a turn"""


@dataclass(frozen=True, kw_only=True)
class AnswerTexts:
    prompts: list[list[int]] | None
    """tokens of the prompts; None: there will be a conversation, whose vocabulary lies in the folder"""
    ends: list[int]
    """tokens that end an answer"""


def answer_texts(
    file: TokenizerFile,
    folder: Path,
    prompts: Sequence[Prompt] | None,
    *,
    vocab_size: int,
    ends: Sequence[int],
    system: str | None,
    template: bool,
) -> AnswerTexts:
    """Have the texts of prompts turned into tokens, and the table `TABLE` of the tokens' texts written into `folder`.

    `ends` are the tokens that end an answer by what the model's files say. Raises InputError for a tokenizer or a
    prompt that cannot be used, and where the tokenizer has no place in the memory that is free.
    """
    answer = with_tokenizer(
        MODULE,
        file,
        {
            "folder": str(folder),
            "prompts": None if prompts is None else list(prompts),
            "vocab_size": vocab_size,
            "ends": list(ends),
            "system": system,
            "template": template,
        },
        doing="turning the prompts into tokens",
        elsewhere=None,
    )
    return AnswerTexts(**answer)


def _texts(vocabulary: Vocabulary, request: dict[str, Any], report: Progress) -> dict[str, Any]:
    folder, vocab_size, prompts = Path(request["folder"]), request["vocab_size"], request["prompts"]
    encoder = Encoder(vocabulary, vocab_size)
    encoded = None
    if prompts is None:
        encoder.chat  # noqa: B018  raises where the model has no chat template
    else:
        encoded = [_encoded(encoder, prompt, request["system"], template=request["template"]) for prompt in prompts]
    with writing_to(folder):
        write_table(str(folder / TABLE), *token_bytes(vocabulary, vocab_size))
        if prompts is None:
            from tightfit.profiles.sources.directory_tokenizer import write_vocabulary

            write_vocabulary(folder, vocabulary)
    return {"prompts": encoded, "ends": _ends(request["ends"], vocabulary)}


def _ends(stated: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """The tokens that end an answer: what the model's files say, and the ends of turns that its chat template
    writes.
    """
    ends = list(stated) or [token for token in [vocabulary.token_id(vocabulary.eos_token)] if token is not None]
    for token in TURN_ENDS:
        number = vocabulary.token_id(token)
        if number is not None and token in (vocabulary.chat_template or ""):
            ends.append(number)
    return list(dict.fromkeys(ends))


def _encoded(encoder: Encoder, prompt: Prompt, system: str | None, *, template: bool) -> list[int]:
    """Tokens of a prompt. Special tokens stay such only in one that no template is applied to: it may be rendered
    already. Raises InputError where there are none, or for tokens that the model lacks.
    """
    if isinstance(prompt, str) and not (template and encoder.vocabulary.chat_template):
        if system is not None:
            raise InputError(
                f"{spelled('system')} needs a chat template, and the model has none or it is not used; leave it out"
            )
        ids = encoder.segments([(prompt, False)])[0] if prompt else []
    else:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        ids = encoder.asked(turns)
    if not ids:
        raise InputError("the prompt is empty; write something to go on from")
    return ids


if __name__ == "__main__":
    sys.exit(work_with_tokenizer(_texts))
