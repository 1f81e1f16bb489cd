"""The options of answers in one record, checked, for the commands and for callers from Python."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.options import option, said
from tightfit.runtime.engine.generation.job import Sampling

CACHES = ("float32", "bfloat16")
CONTEXT = 2048
"""tokens of a conversation that are remembered, by default"""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How to answer. `tightfit generate` and `tightfit chat` have the fields that are made by `option`.

    Raises InputError for values that cannot be used.
    """

    system: str | None = option(None, "What the system turn says.", metavar="TEXT", primary=True)
    """which a chat template puts before the prompt"""
    template: bool = option(True, "Put prompts into the model's chat template, if it has one.")
    context: int | None = option(
        None,
        f"Tokens of the conversation that are remembered, the next answer included; default: {CONTEXT}.",
        metavar="TOKENS",
        least=2,
    )
    """None: `CONTEXT`, or as many as the model was made for"""
    max_tokens: int = option(256, "Most tokens of an answer.", least=1, primary=True)
    temperature: float = option(
        0.0, "0: take the likeliest token; else draw, the more evenly the higher.", least=0, primary=True
    )
    top_p: float = option(
        1.0, "Draw from the likeliest tokens that make up this share.", metavar="SHARE", above=0, most=1
    )
    top_k: int = option(0, "Draw from so many of the likeliest tokens; 0: from all.", least=0)
    seed: int = option(0, "Seed of the tokens that are drawn.", least=0)
    cache: str = option(
        "float32",
        "Type of the cache of keys and values: float32, or bfloat16 for half of its bytes.",
        metavar="TYPE",
        choices=CACHES,
    )
    base: str | None = option(
        None, "Of matrices that MODEL does not hold quantised: 4bit (default), 8bit or 16bit.", metavar="PRECISION"
    )
    embeddings: str | None = option(None, "The same for embedding and head; default: as --base.", metavar="PRECISION")
    threads: int | None = option(None, "Cores to compute with; default: all.")
    force: bool = False
    """whether to measure again"""

    def __post_init__(self) -> None:
        for name, told in said(AnswerOptions).items():
            value = getattr(self, name)
            if told.least is not None and value is not None and not told.least <= value < 1 << 32:
                raise InputError(f"{spelled(name)} {value}: give a number of at least {told.least}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"{spelled('top_p')} {self.top_p}: give a number above 0, at most 1")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise InputError(
                f"{spelled('top_k')} and {spelled('top_p')} choose among tokens that are drawn at random; give {spelled('temperature')} too"
            )
        if self.cache not in CACHES:
            raise InputError(f"{spelled('cache')} {self.cache}: give {' or '.join(CACHES)}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)
