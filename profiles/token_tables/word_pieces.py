"""WordPiece and unigram models by a table: the tokens of a word, as the `tokenizers` library has them."""

from __future__ import annotations

from tightfit.profiles.token_tables.pieces import Pieces
from tightfit.profiles.token_tables.table_file import TableFile, UnigramSettings, WordPieceSettings

UNKNOWN_PENALTY = 10.0
"""by how much the score of an unknown letter is below the lowest of all tokens"""


class WordPieces(Pieces):
    """Splits words into the longest tokens, from the left."""

    def __init__(self, table: TableFile) -> None:
        super().__init__()
        assert isinstance(table.settings, WordPieceSettings)
        self._table, self._settings = table, table.settings
        unknown = table.find(table.settings.unk_token)
        assert unknown is not None
        self._unknown = unknown

    def tokens(self, word: str) -> tuple[list[int], list[int]]:
        """(the tokens of a word, how many of its bytes in UTF-8 each stands for). A word of which a part is no token is unknown."""
        unknown = [self._unknown], [len(word.encode())]
        if len(word) > self._settings.max_input_chars_per_word:
            return unknown
        ids: list[int] = []
        sizes: list[int] = []
        begin = 0
        while begin < len(word):
            prefix = self._settings.continuing_subword_prefix if begin else ""
            for end in range(min(len(word), begin + self._table.longest), begin, -1):
                number = self._table.find(prefix + word[begin:end])
                if number is not None:
                    break
            else:
                return unknown
            ids.append(number)
            sizes.append(len(word[begin:end].encode()))
            begin = end
        return ids, sizes


class UnigramPieces(Pieces):
    """Splits words into the tokens whose scores have the highest sum."""

    def __init__(self, table: TableFile) -> None:
        super().__init__()
        assert isinstance(table.settings, UnigramSettings)
        assert table.settings.unk_id is not None
        self._table, self._settings, self._unknown = table, table.settings, table.settings.unk_id
        self._unknown_score = min(table.scores) - UNKNOWN_PENALTY

    def tokens(self, word: str) -> tuple[list[int], list[int]]:
        """(the tokens of a word, how many of its bytes in UTF-8 each stands for; 0: for those of the token before it).

        Unknown letters beside each other are one token, or where there are tokens of bytes, those of all their bytes.
        """
        ids: list[int] = []
        sizes: list[int] = []
        for part in self._parts(word):
            size = len(part.encode())
            number = self._table.find(part)
            found = [number]
            if number is None and self._settings.byte_fallback:
                found = [self._table.find(f"<0x{byte:02X}>") for byte in part.encode()]
            numbers = [each for each in found if each is not None]
            if len(numbers) < len(found):
                numbers = [self._unknown]
            ids += numbers
            sizes += [size, *[0] * (len(numbers) - 1)]
        return ids, sizes

    def _parts(self, word: str) -> list[str]:
        """The parts of a word that are tokens, or unknown letters beside each other."""
        table, scores, count = self._table, self._table.scores, len(word)
        best: list[tuple[float, int, int] | None] = [None] * (count + 1)
        """by where a part ends: (sum of the scores so far, where it begins, its token)"""

        def reached(end: int, score: float, begin: int, token: int) -> None:
            known = best[end]
            if known is None or score > known[0]:
                best[end] = score, begin, token

        for begin in range(count):
            before = best[begin]
            so_far = before[0] if before is not None else 0.0
            for end in range(begin + 1, min(count, begin + table.longest) + 1):
                token = table.find(word[begin:end])
                if token is not None:
                    reached(end, scores[token] + so_far, begin, token)
                elif end == begin + 1:
                    reached(end, self._unknown_score + so_far, begin, self._unknown)
        parts: list[str] = []
        end, unknown = count, 0
        """where the part ends, and where the unknown letters end that follow it, if some do"""
        while end:
            step = best[end]
            assert step is not None
            _, begin, token = step
            if token == self._unknown:
                unknown = unknown or end
            else:
                if unknown:
                    parts.append(word[end:unknown])
                parts.append(word[begin:end])
                unknown = 0
            end = begin
        if unknown:
            parts.append(word[:unknown])
        return parts[::-1]
