"""Samples as tokens in a file, so that data whose longest sample decides on the length of a sequence are tokenised once.

For each sample, little-endian: the number of its token sequences (uint32); then for each of them its length (uint32), a
choice (int32), whether it is the right answer and whether it is a text (a byte each), its token ids (int32), and, unless
it is a text, a byte for each token: whether it is to be predicted.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tightfit.runtime.common.errors import InputError

_COUNT, _HEAD = struct.Struct("<I"), struct.Struct("<Ii??")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample, or one choice of a question, as tokens, before it is fitted into a row."""

    ids: list[int]
    wanted: list[bool] | None
    """for each token, whether it is to be predicted; None: a text, all of which is, and which may be cut into windows"""
    choice: int = -1
    answer: bool = False


def write(file: IO[bytes], sample: Sequence[Encoded]) -> None:
    """Append a sample."""
    file.write(_COUNT.pack(len(sample)))
    for one in sample:
        file.write(_HEAD.pack(len(one.ids), one.choice, one.answer, one.wanted is None))
        file.write(_words(one.ids))
        if one.wanted is not None:
            file.write(bytes(one.wanted))


def read(path: Path) -> Iterator[list[Encoded]]:
    """The samples, in the order in which they were written. Raises InputError where the file is missing or cut off."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; tokenise the data again") from error
    with file:
        while head := file.read(_COUNT.size):
            yield [_one(file, path) for _ in range(_COUNT.unpack(head)[0])]


def _one(file: IO[bytes], path: Path) -> Encoded:
    head = file.read(_HEAD.size)
    if len(head) == _HEAD.size:
        length, choice, answer, text = _HEAD.unpack(head)
        ids, wanted = file.read(4 * length), b"" if text else file.read(length)
        if len(ids) == 4 * length and len(wanted) == (0 if text else length):
            words = array("i", ids)
            if sys.byteorder == "big":
                words.byteswap()
            flags = None if text else [bool(flag) for flag in wanted]
            return Encoded(ids=words.tolist(), wanted=flags, choice=choice, answer=answer)
    raise InputError(f"{path}: cut off; tokenise the data again")


def _words(ids: Sequence[int]) -> bytes:
    words = array("i", ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
