"""Text to tokens and back, whatever file the tokenizer was read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer, and what its model was trained to see around a text."""

    tokenizer: Tokenizer
    chat_template: str | None = None
    """Jinja source."""
    tool_template: str | None = None
    """Jinja source of a template of its own for conversations with tools."""
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    add_bos: bool = False
    """Whether the model expects `bos_token` before every text."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """Further names that the chat template may use, such as unk_token."""

    def token_id(self, token: str | None) -> int | None:
        return None if token is None else self.tokenizer.token_to_id(token)
