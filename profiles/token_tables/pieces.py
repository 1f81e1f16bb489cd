"""What the models that split a word into tokens by a table have in common: words come again and again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

KEPT_WORDS = 1 << 14
"""how many are remembered"""
LONGEST_KEPT = 48
"""letters of a word that is remembered"""


class Pieces(ABC):
    """A model that splits a word into tokens by a table."""

    def __init__(self) -> None:
        self._kept = lru_cache(KEPT_WORDS)(lambda word: self.tokens(word)[0])

    def ids(self, piece: str) -> list[int]:
        """The tokens of what a text was split into."""
        return self._kept(piece) if len(piece) <= LONGEST_KEPT else self.tokens(piece)[0]

    @abstractmethod
    def tokens(self, word: str) -> tuple[list[int], list[int]]:
        """(the tokens of a word, how many of its bytes in UTF-8 each stands for; 0: for those of the token before it)."""
