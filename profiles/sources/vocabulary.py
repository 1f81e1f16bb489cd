"""Defines `Vocabulary`: a model's tokenizer, chat templates and special tokens, whatever file they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Encoding(Protocol):
    """The tokens of a text."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(begin, end) in the text of what each token stands for, in letters."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer: what a `tokenizers.Tokenizer` and a table on disk
    (`tightfit.profiles.token_tables.tokenizer_table`) have in common.
    """

    decoder: Any
    """one of `tokenizers.decoders`, or None"""

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> Encoding:
        """The tokens of a text, with those that the tokenizer puts around it if `add_special_tokens`."""

    def token_to_id(self, token: str, /) -> int | None: ...

    def id_to_token(self, number: int, /) -> str | None: ...

    def get_vocab_size(self) -> int:
        """The number of tokens, added ones too."""

    def get_added_tokens_decoder(self) -> Mapping[int, Any]:
        """The added tokens by id; each has `content` and says whether it is `special`."""


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
        return None if token is None else self.tokenizer.token_to_id(token)
