"""Defines `Vocabulary`: a model's tokenizer, chat templates and special tokens, whatever file they were read from.

The library `tokenizers` is not imported here: most processes that know of a vocabulary do not hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tightfit.runtime.common.errors import InputError, TightfitError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, WORDS = "tokenizer.json", "vocabulary.json"
"""files of a vocabulary in the form that `tightfit.profiles.sources.directory_tokenizer.write_vocabulary` gives it"""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer with the special tokens and templates that its model was trained with."""

    tokenizer: Tokenizer
    chat_template: str | None = None
    """Jinja source."""
    tool_template: str | None = None
    """Jinja source of the separate template for conversations with tools, if there is one."""
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    add_bos: bool = False
    """Whether the model expects `bos_token` before every text."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """Further names that the chat template may use, such as unk_token."""

    def token_id(self, token: str | None) -> int | None:
        number: int | None = None if token is None else self.tokenizer.token_to_id(token)
        return number


@contextmanager
def refusals(what: object, remedy: str) -> Iterator[None]:
    """Raise InputError for what the library `tokenizers` raises inside: bare Exceptions, and panics, which are none."""
    try:
        yield
    except TightfitError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what} ({error}); {remedy}") from error
        raise
