"""Byte-pair encoding by a table: the tokens of a word, as the `tokenizers` library has them."""

from __future__ import annotations

import re
from functools import lru_cache
from heapq import heapify, heappop, heappush

from tightfit.profiles.token_tables.pieces import LONGEST_KEPT, Pieces
from tightfit.profiles.token_tables.table_file import SPACE, BpeSettings, TableFile

KEPT_PAIRS, KEPT_LETTERS = 1 << 13, 1 << 11
"""how many of each are remembered"""
POSITION = (1 << 32) - 1


class BytePairs(Pieces):
    """Splits words into tokens by the merges of a table."""

    def __init__(self, table: TableFile) -> None:
        super().__init__()
        assert isinstance(table.settings, BpeSettings)
        self._table, self._settings = table, table.settings
        self._unknown = None if table.settings.unk_token is None else table.find(table.settings.unk_token)
        self._merge = lru_cache(KEPT_PAIRS)(table.merge)
        self._letter = lru_cache(KEPT_LETTERS)(self._of_letter)
        self._cut: re.Pattern[str] | None = None
        if table.cut_after:
            self._cut = re.compile(f"(?<=[^{re.escape(table.cut_after)}])(?={SPACE})")

    def ids(self, piece: str) -> list[int]:
        """The tokens of what a text was split into, cut where no token goes on."""
        if self._cut is None:
            return super().ids(piece)
        kept = self._kept
        ids: list[int] = []
        for word in self._cut.split(piece):
            ids += kept(word) if len(word) <= LONGEST_KEPT else self.tokens(word)[0]
        return ids

    def tokens(self, word: str) -> tuple[list[int], list[int]]:
        """(the tokens of a word, how many of its bytes in UTF-8 each stands for).

        Of all pairs of neighbours that a merge joins, that of the lowest rank is joined first, and of equal ones the leftmost.
        """
        if self._settings.ignore_merges and (whole := self._table.find(word)) is not None:
            return [whole], [len(word.encode())]
        ids, sizes = self._letters(word)
        count, merge = len(ids), self._merge
        queue: list[int] = []
        for position in range(count - 1):
            if joined := merge(ids[position], ids[position + 1]):
                queue.append(joined[0] << 32 | position)
        if not queue:
            return ids, sizes
        heapify(queue)
        following, preceding = list(range(1, count + 1)), list(range(-1, count - 1))
        while queue:
            first = heappop(queue)
            position = first & POSITION
            if ids[position] < 0 or (right := following[position]) == count:
                continue
            joined = merge(ids[position], ids[right])
            if joined is None or joined[0] != first >> 32:  # a neighbour has been joined with another since
                continue
            ids[position] = token = joined[1]
            ids[right] = -1
            sizes[position] += sizes[right]
            following[position] = after = following[right]
            before = preceding[position]
            if before >= 0 and (joined := merge(ids[before], token)):
                heappush(queue, joined[0] << 32 | before)
            if after < count:
                preceding[after] = position
                if joined := merge(token, ids[after]):
                    heappush(queue, joined[0] << 32 | position)
        left = [position for position in range(count) if ids[position] >= 0]
        return [ids[position] for position in left], [sizes[position] for position in left]

    def _letters(self, word: str) -> tuple[list[int], list[int]]:
        """The tokens of a word's letters, before any are merged, and their bytes."""
        settings = self._settings
        prefix, suffix = settings.continuing_subword_prefix or "", settings.end_of_word_suffix or ""
        ids: list[int] = []
        sizes: list[int] = []
        unknown = 0
        """bytes that stand for an unknown token, which is not written yet"""
        last = len(word) - 1
        for position, letter in enumerate(word):
            size = len(letter.encode())
            marked = (prefix if position else "") + letter + (suffix if position == last else "")
            known, tokens = self._letter(marked)
            if known or (tokens is None and not settings.fuse_unk):
                unknown = self._flush(ids, sizes, unknown)
            if tokens is None:
                unknown += size if self._unknown is not None else 0
            else:
                ids.extend(tokens)
                sizes.extend([size] if known else [1] * len(tokens))
        self._flush(ids, sizes, unknown)
        return ids, sizes

    def _flush(self, ids: list[int], sizes: list[int], unknown: int) -> int:
        """Write the unknown token for so many bytes, if there are any."""
        if unknown:
            assert self._unknown is not None
            ids.append(self._unknown)
            sizes.append(unknown)
        return 0

    def _of_letter(self, letter: str) -> tuple[bool, tuple[int, ...] | None]:
        """(whether a letter is a token, its tokens: itself, or its bytes'; None: it is unknown)."""
        number = self._table.find(letter)
        if number is not None:
            return True, (number,)
        if self._settings.byte_fallback:
            tokens = [self._table.find(f"<0x{byte:02X}>") for byte in letter.encode()]
            known = tuple(token for token in tokens if token is not None)
            if len(known) == len(tokens):
                return False, known
        return False, None
