"""The file of a tokenizer's table: written from a vocabulary and its merges or scores, read where it lies.

It begins with `HEAD`: a mark, a version, the CRC-32 of all that follows and the length of a JSON text. That text holds the
tokenizer without its vocabulary and what its model is, and says where each list of numbers lies, from the next multiple
of 8 bytes on:

- ``strings``: the tokens, one after the other in UTF-8; ``ends`` (uint32): by id, where each ends,
- ``hashes`` (uint32): the CRC-32 of each token, in order; ``ids`` (uint32): the token that has it,
- of byte-pair encodings ``pairs`` (uint64): left id << 32 | right id of each merge, in order; ``ranks``, ``merged``
  (uint32): its rank and what the two become,
- of unigram models ``scores`` (float64): by id, the logarithm of the token's probability.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import sys
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import open_regular, write_whole
from tightfit.runtime.common.strict_json import from_json, to_json

HEAD = struct.Struct("<8sIIQ")
MARK, VERSION = b"TFTOKENS", 1
ALIGNMENT = 8
BLOCK = 1 << 16
TYPES: dict[str, Literal["B", "I", "Q", "d"]] = {
    "strings": "B",
    "ends": "I",
    "hashes": "I",
    "ids": "I",
    "pairs": "Q",
    "ranks": "I",
    "merged": "I",
    "scores": "d",
}
"""format letter of `struct` of each list"""
LOW = (1 << 32) - 1
SPARSEST = 4
"""ids for each token that there may be"""
SPACE = "▁"
"""what a space becomes in vocabularies of SentencePiece"""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>$")


class NoTableError(Exception):
    """A tokenizer is of a kind of which no table is made."""


@dataclass(frozen=True, kw_only=True)
class BpeSettings:
    """What a byte-pair encoding does beside its merges, as tokenizer.json names it."""

    unk_token: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


@dataclass(frozen=True, kw_only=True)
class WordPieceSettings:
    """What a WordPiece model has beside its vocabulary, as tokenizer.json names it."""

    unk_token: str
    continuing_subword_prefix: str = "##"
    max_input_chars_per_word: int = 100


@dataclass(frozen=True, kw_only=True)
class UnigramSettings:
    """What a unigram model has beside its scores, as tokenizer.json names it."""

    unk_id: int | None = None
    byte_fallback: bool = False


Settings = BpeSettings | WordPieceSettings | UnigramSettings
SETTINGS: dict[str, type[Settings]] = {"BPE": BpeSettings, "WordPiece": WordPieceSettings, "Unigram": UnigramSettings}
"""kind of a model, as tokenizer.json names it -> its settings"""


@dataclass(frozen=True, kw_only=True)
class TableParts:
    """What a table is made of."""

    pipeline: dict[str, Any]
    """tokenizer.json without a vocabulary"""
    settings: Settings
    ids: dict[str, int]
    merges: Iterable[tuple[str, str]] = ()
    scores: Sequence[float] = ()
    """by id, of a unigram model"""


def write_table(path: Path, parts: TableParts) -> None:
    """Write the table of a tokenizer, whole or not at all.

    Raises NoTableError for one that a table cannot be made of, and what `write_whole` raises.
    """
    _check(parts)
    lists, cut_after = _tokens(parts.ids), None
    if isinstance(parts.settings, BpeSettings):
        merges, cut_after = _merges(parts, parts.settings)
        lists |= merges
    elif isinstance(parts.settings, UnigramSettings):
        lists["scores"] = array("d", parts.scores)
    where: dict[str, tuple[int, int]] = {}
    body: list[Any] = []
    end = 0
    for name, numbers in lists.items():
        size = memoryview(numbers).nbytes
        where[name] = (end, size)
        padding = bytes(-size % ALIGNMENT)
        body += [numbers, padding]
        end += size + len(padding)
    described: dict[str, Any] = {"pipeline": parts.pipeline, "settings": asdict(parts.settings), "lists": where}
    described["kind"] = next(kind for kind, settings in SETTINGS.items() if isinstance(parts.settings, settings))
    described |= {"added": _added_ids(parts), "cut_after": cut_after, "longest": max(map(len, parts.ids), default=0)}
    text = to_json(described).encode()
    padding = bytes(-(HEAD.size + len(text)) % ALIGNMENT)
    checksum = 0
    for block in (text, padding, *body):
        checksum = zlib.crc32(block, checksum)
    write_whole(path, b"".join([HEAD.pack(MARK, VERSION, checksum, len(text)), text, padding, *body]))


def _check(parts: TableParts) -> None:
    """Raise NoTableError for what the library refuses, or does in a way that is not followed here."""
    settings = parts.settings
    if sys.byteorder != "little" or len(set(parts.ids.values())) < len(parts.ids):
        raise NoTableError("two tokens have one id")
    if max(parts.ids.values(), default=0) > SPARSEST * len(parts.ids):
        raise NoTableError("most ids have no token")
    if isinstance(settings, UnigramSettings):
        if settings.unk_id is None or not 0 <= settings.unk_id < len(parts.ids) or "" in parts.ids:
            raise NoTableError(f"the unknown token {settings.unk_id} is not in the vocabulary, or a token is empty")
        return
    if settings.unk_token is not None and settings.unk_token not in parts.ids:
        raise NoTableError(f"the unknown token {settings.unk_token!r} is not in the vocabulary")
    if (
        isinstance(settings, BpeSettings)
        and settings.byte_fallback
        and (settings.continuing_subword_prefix or settings.end_of_word_suffix)
    ):
        raise NoTableError("bytes stand for letters that have marks of their place in the word")


def _tokens(ids: dict[str, int]) -> dict[str, Any]:
    """The lists of the tokens."""
    count = max(ids.values(), default=-1) + 1
    by_id = [""] * count
    for token, number in ids.items():
        by_id[number] = token
    strings, ends = bytearray(), array("I")
    for token in by_id:
        strings += token.encode()
        ends.append(len(strings))
    hashed = sorted(zlib.crc32(token.encode()) << 32 | number for token, number in ids.items())
    return {
        "strings": strings,
        "ends": ends,
        "hashes": array("I", (each >> 32 for each in hashed)),
        "ids": array("I", (each & LOW for each in hashed)),
    }


def _merges(parts: TableParts, settings: BpeSettings) -> tuple[dict[str, Any], str | None]:
    """(the lists of the merges, the letters after which a text is not to be cut before a "▁").

    Of two merges of the same pair the later counts, as with the library. A text that nothing has split into words is one
    word, but what it consists of comes again and again: where no merge joins a letter with a "▁" behind it, the two parts
    have the tokens that they have in the whole. None where there is no such place.
    """
    ids = parts.ids
    prefix = len(settings.continuing_subword_prefix or "")
    ranked: list[int] = []
    merged, before = array("I"), set[str]()
    for rank, (left, right) in enumerate(parts.merges):
        together = left + right[prefix:]
        if left not in ids or right not in ids or together not in ids:
            raise NoTableError(f"the merge {left!r} {right!r} names no token")
        ranked.append(ids[left] << 64 | ids[right] << 32 | rank)
        merged.append(ids[together])
        if right.startswith(SPACE):
            before.add("" if _BYTE.search(left) or left.endswith(settings.unk_token or "\0") else left[-1:])
    ranked.sort()
    pairs, ranks = array("Q"), array("I")
    for each in ranked:
        if pairs and pairs[-1] == each >> 32:
            pairs.pop()
            ranks.pop()
        pairs.append(each >> 32)
        ranks.append(each & LOW)
    lists = {"pairs": pairs, "ranks": ranks, "merged": array("I", map(merged.__getitem__, ranks))}
    whole = settings.ignore_merges or settings.continuing_subword_prefix or settings.end_of_word_suffix
    left_out = settings.unk_token is None  # letters may be, and then others become neighbours
    split = parts.pipeline["pre_tokenizer"] is not None
    cannot_be_cut = whole or left_out or split or SPACE not in ids or "" in before
    return lists, None if cannot_be_cut else "".join(sorted(before))


def _added_ids(parts: TableParts) -> dict[str, int]:
    """The ids of added tokens, which the library gives in their order. Raises NoTableError where the file says others."""
    ids: dict[str, int] = {}
    for token in parts.pipeline["added_tokens"]:
        content = token["content"]
        due = parts.ids.get(content)
        if due is None:
            due = max(len(parts.ids), max(ids.values(), default=-1) + 1)
        if not content or content in ids or token["id"] != due:
            raise NoTableError(f"the added token {content!r} has another id than the library gives it")
        ids[content] = due
    return ids


class TableFile:
    """A table that is open for reading. Its lists are mapped from the file, not read."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be opened, and InputError, which says so, where it is damaged."""
        self.path = path
        with open_regular(path) as file:
            head = file.read(HEAD.size)
            size = os.fstat(file.fileno()).st_size
            if len(head) < HEAD.size:
                raise InputError(f"{path}: cut off; remove it, and it is made again")
            mark, version, checksum, length = HEAD.unpack(head)
            computed = 0
            while block := file.read(BLOCK):
                computed = zlib.crc32(block, computed)
            if (mark, version, checksum) != (MARK, VERSION, computed) or length > size:
                raise InputError(f"{path}: damaged; remove it, and it is made again")
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        described = from_json(bytes(mapped[HEAD.size : HEAD.size + length]))
        begin = HEAD.size + length + -(HEAD.size + length) % ALIGNMENT
        self.pipeline: dict[str, Any] = described["pipeline"]
        self.kind: str = described.get("kind", "BPE")
        self.settings = SETTINGS[self.kind](**described["settings"])
        self.added: dict[str, int] = described["added"]
        self.cut_after: str | None = described["cut_after"]
        lists: dict[str, Any] = {
            name: mapped[begin + offset : begin + offset + count].cast(TYPES[name])
            for name, (offset, count) in described["lists"].items()
        }
        self._strings, self._ends = lists["strings"], lists["ends"]
        self._hashes, self._ids = lists["hashes"], lists["ids"]
        self._pairs, self._ranks, self._merged = (lists.get(name, ()) for name in ("pairs", "ranks", "merged"))
        self.scores: Sequence[float] = lists.get("scores", ())
        self.count = len(self._ids)
        """tokens of the vocabulary, without added ones"""
        self.longest: int = described.get("longest", 0)
        """letters of the longest token"""

    def find(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""
        data = token.encode()
        checksum = zlib.crc32(data)
        at = bisect_left(self._hashes, checksum)
        while at < len(self._hashes) and self._hashes[at] == checksum:
            number: int = self._ids[at]
            if self._bytes(number) == data:
                return number
            at += 1
        return None

    def token(self, number: int) -> str | None:
        """The token that has an id."""
        if not 0 <= number < len(self._ends):
            return None
        token = str(self._bytes(number), "utf-8")
        return token if token or self.find(token) == number else None

    def merge(self, left: int, right: int) -> tuple[int, int] | None:
        """(rank, id of what they become) of two tokens that are merged."""
        pair = left << 32 | right
        at = bisect_left(self._pairs, pair)
        if at < len(self._pairs) and self._pairs[at] == pair:
            return self._ranks[at], self._merged[at]
        return None

    def _bytes(self, number: int) -> memoryview:
        """A token in UTF-8."""
        text: memoryview = self._strings[self._ends[number - 1] if number else 0 : self._ends[number]]
        return text
