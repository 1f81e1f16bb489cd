"""Defines `Vocabulary`: a model's tokenizer, chat templates and special tokens, whatever file they were read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
