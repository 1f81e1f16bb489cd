"""A tokenizer whose vocabulary stays on disk.

The `tokenizers` library does what takes no memory: it normalises a text, finds added tokens in it and splits it into words.
For that its model is one that knows no word, and hands on each as it is; the words become tokens by the table. The ids
are those that the library gives with the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tightfit.profiles.token_tables.byte_pairs import BytePairs
from tightfit.profiles.token_tables.pieces import Pieces
from tightfit.profiles.token_tables.table_file import NoTableError, TableFile
from tightfit.profiles.token_tables.word_pieces import UnigramPieces, WordPieces
from tightfit.runtime.common.strict_json import to_json

_NOBODY_S = "\U0010ffff" * 8
WHOLE_WORDS = {"type": "Unigram", "unk_id": 0, "vocab": [[_NOBODY_S, 0.0]], "byte_fallback": False}
"""A model whose only token is the unknown one: all unknown letters of a word become one token, whose text is the word."""
LETTERS = {"type": "BPE", "vocab": {_NOBODY_S: 0}, "merges": [], "unk_token": _NOBODY_S, "fuse_unk": False}
"""A model by which each letter is a token."""


MODELS: dict[str, Callable[[TableFile], Pieces]] = {
    "BPE": BytePairs,
    "WordPiece": WordPieces,
    "Unigram": UnigramPieces,
}


def library_pipeline(pipeline: dict[str, Any], model: dict[str, Any]) -> Tokenizer:
    """A tokenizer of the library with a model of its own. Raises NoTableError for a pipeline that it does not take."""
    try:
        return Tokenizer.from_str(to_json(pipeline | {"model": model}))
    except Exception as error:  # tokenizers raises bare Exception
        raise NoTableError(str(error)) from error


class TableEncoding:
    """The tokens of a text."""

    def __init__(self, ids: list[int], offsets: Callable[[], list[tuple[int, int]]]) -> None:
        self.ids = ids
        self._offsets = offsets

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(begin, end) in the text of what each token stands for; found when they are asked for."""
        return self._offsets()


class TokenizerTable:
    """What is needed of a `tokenizers.Tokenizer` (`tightfit.profiles.sources.vocabulary`), by a table."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the table cannot be opened, and InputError where it is damaged."""
        self.path = path
        self._file = TableFile(path)
        self._model = MODELS[self._file.kind](self._file)
        self._words = library_pipeline(self._file.pipeline, WHOLE_WORDS)
        self._by_letter: Tokenizer | None = None
        added: dict[int, AddedToken] = self._words.get_added_tokens_decoder()
        self._ids_of_added = {number: self._file.added[token.content] for number, token in added.items()}
        self._numbers_of_added = dict(zip(self._ids_of_added.values(), self._ids_of_added))
        """what they are to the library, which numbers them from 1 on where no word is known"""
        self._size = self._file.count + sum(self._file.find(content) is None for content in self._file.added)
        self.decoder = self._words.decoder

    def encode(self, text: str, *, add_special_tokens: bool = True) -> TableEncoding:
        """The tokens of a text, with those that the tokenizer puts around it if `add_special_tokens`."""
        encoding = self._words.encode(text, add_special_tokens=add_special_tokens)
        around: list[int] = encoding.special_tokens_mask if add_special_tokens else [0] * len(encoding)
        pieces: list[tuple[int, str, int]] = list(zip(encoding.ids, encoding.tokens, around, strict=True))
        ids: list[int] = []
        of_piece, of_added = self._model.ids, self._ids_of_added
        for number, piece, is_around in pieces:
            if is_around:
                ids.append(number)
            elif number:
                ids.append(of_added[number])
            else:
                ids += of_piece(piece)
        return TableEncoding(ids, lambda: self._offsets(text, pieces))

    def _offsets(self, text: str, pieces: list[tuple[int, str, int]]) -> list[tuple[int, int]]:
        """What each token of a text stands for, as `encode` has split it; nothing for those around it."""
        if self._by_letter is None:
            self._by_letter = library_pipeline(self._file.pipeline, LETTERS)
        letters = iter(self._by_letter.encode(text, add_special_tokens=False).offsets)
        offsets: list[tuple[int, int]] = []
        for number, piece, is_around in pieces:
            if is_around or number:
                offsets.append((0, 0) if is_around else next(letters))
                continue
            places = [place for letter, place in zip(piece, letters) for _ in letter.encode()]  # of its bytes
            begin = 0
            for size in self._model.tokens(piece)[1]:
                offsets.append((places[begin][0], places[begin + size - 1][1]) if size else offsets[-1])
                begin += size
        return offsets

    def token_to_id(self, token: str) -> int | None:
        added = self._file.added.get(token)
        return self._file.find(token) if added is None else added

    def id_to_token(self, number: int) -> str | None:
        added = self._numbers_of_added.get(number)
        if added is None:
            return self._file.token(number)
        token: str | None = self._words.id_to_token(added)
        return token

    def get_vocab_size(self) -> int:
        """The number of tokens, added ones too."""
        return self._size

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        added: dict[int, AddedToken] = self._words.get_added_tokens_decoder()
        return {self._ids_of_added[number]: token for number, token in added.items()}
