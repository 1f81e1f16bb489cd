"""The options of answers in one record, checked, for the commands and for callers from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from tightfit.profiles.option_fields import option
from tightfit.profiles.options import Bits, PathText
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.generation.job import Sampling
from tightfit.runtime.session.options import CappedOptions

CONTEXT = 2048
"""tokens of a conversation that are remembered, by default"""


class AnswerOptions(CappedOptions):
    """How to answer. `tightfit generate` and `tightfit chat` have the fields that are made by `option`.

    Raises InputError for values that cannot be used.
    """

    adapter: PathText | Path | None = option(
        None,
        "Folder of an adapter of PEFT, or of the run that left it; applied unmerged.",
        metavar="DIR",
        primary=True,
    )
    bundle: PathText | Path | None = option(
        None, "Take the traced answers from this bundle, which `tightfit prepare` made.", metavar="DIR"
    )
    system: str | None = option(None, "What the system turn says.", metavar="TEXT", primary=True)
    """which a chat template puts before the prompt"""
    template: bool = option(True, "Put prompts into the model's chat template, if it has one.")
    context: int | None = option(
        None,
        f"Tokens of the conversation that are remembered, the next answer included; default: {CONTEXT}.",
        metavar="TOKENS",
        ge=2,
        lt=1 << 32,
    )
    """None: `CONTEXT`, or as many as the model was made for"""
    max_tokens: int = option(256, "Most tokens of an answer.", ge=1, lt=1 << 32, primary=True)
    temperature: float = option(
        0.0, "0: take the likeliest token; else draw, the more evenly the higher.", ge=0, lt=1 << 32, primary=True
    )
    top_p: float = option(1.0, "Draw from the likeliest tokens that make up this share.", metavar="SHARE", gt=0, le=1)
    top_k: int = option(0, "Draw from so many of the likeliest tokens; 0: from all.", ge=0, lt=1 << 32)
    seed: int = option(0, "Seed of the tokens that are drawn.", ge=0, lt=1 << 32)
    cache: Literal["float32", "bfloat16"] = option(
        "float32",
        "Type of the cache of keys and values: float32, or bfloat16 for half of its bytes.",
        metavar="TYPE",
    )
    base: Bits | None = option(
        None, "Of matrices that MODEL does not hold quantised: 4bit (default), 8bit or 16bit.", metavar="PRECISION"
    )
    embeddings: Bits | None = option(None, "The same for embedding and head; default: as --base.", metavar="PRECISION")
    threads: int | None = option(None, "Cores to compute with; default: all.", ge=1, le=1 << 12)
    force: bool = option(False, "Measure again even where a fitting result lies in the cache.")

    choose: Any = None
    """chooses on another machine what stays in memory (`tightfit.planner.generation.choice.Choose`); None: this one
    does
    """
    shown: Any = None
    """is called with the text as it comes"""

    @model_validator(mode="after")
    def _drawn(self) -> Self:
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise InputError(
                f"{spelled('top_k')} and {spelled('top_p')} choose among tokens that are drawn at random; give"
                f" {spelled('temperature')} too"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)
