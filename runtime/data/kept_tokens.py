"""Samples as tokens in a file, so that data whose longest sample decides on the length of a sequence are tokenised
once.

It begins with the number of tokens that rows may be padded with, the preferred first, and these (int32 each). Then for
each sample, little-endian: the number of its token sequences (uint32); then for each of them its length (uint32), a
choice (int32), whether it is the right answer and whether it is a text (a byte each), its token ids (int32), and,
unless it is a text, a byte for each token: whether it is to be predicted.
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
class TokenSequence:
    """A sample, or one choice of a question, as tokens, before it is fitted into a row."""

    ids: list[int]
    predicted: list[bool] | None
    """for each token, whether it is to be predicted; None: a text, all of which is, and which may be cut into
    windows
    """
    choice: int = -1
    answer: bool = False


def begin(file: IO[bytes], padding: Sequence[int]) -> None:
    """Write what comes before the samples: the tokens to pad with."""
    file.write(_COUNT.pack(len(padding)))
    file.write(_id_bytes(padding))


def write(file: IO[bytes], sample: Sequence[TokenSequence]) -> None:
    """Append a sample."""
    file.write(_COUNT.pack(len(sample)))
    for sequence in sample:
        file.write(_HEAD.pack(len(sequence.ids), sequence.choice, sequence.answer, sequence.predicted is None))
        file.write(_id_bytes(sequence.ids))
        if sequence.predicted is not None:
            file.write(bytes(sequence.predicted))


def padding(path: Path) -> list[int]:
    """The tokens to pad with. Raises InputError where the file is missing or cut off."""
    with _opened(path) as file:
        return _read_padding(file, path)


def read(path: Path) -> Iterator[list[TokenSequence]]:
    """The samples, in the order in which they were written. Raises InputError where the file is missing or cut off."""
    with _opened(path) as file:
        _read_padding(file, path)
        while head := file.read(_COUNT.size):
            yield [_read_sequence(file, path) for _ in range(_COUNT.unpack(head)[0])]


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; tokenise the data again") from error


def _read_padding(file: IO[bytes], path: Path) -> list[int]:
    head = file.read(_COUNT.size)
    if len(head) == _COUNT.size:
        count = _COUNT.unpack(head)[0]
        ids = file.read(4 * count)
        if len(ids) == 4 * count:
            return _ids(ids)
    raise _cut_off(path)


def _cut_off(path: Path) -> InputError:
    return InputError(f"{path}: cut off; tokenise the data again")


def _read_sequence(file: IO[bytes], path: Path) -> TokenSequence:
    head = file.read(_HEAD.size)
    if len(head) == _HEAD.size:
        length, choice, answer, text = _HEAD.unpack(head)
        ids, predicted = file.read(4 * length), b"" if text else file.read(length)
        if len(ids) == 4 * length and len(predicted) == (0 if text else length):
            flags = None if text else [bool(flag) for flag in predicted]
            return TokenSequence(ids=_ids(ids), predicted=flags, choice=choice, answer=answer)
    raise _cut_off(path)


def _ids(data: bytes) -> list[int]:
    token_ids = array("i", data)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids.tolist()


def _id_bytes(ids: Sequence[int]) -> bytes:
    token_ids = array("i", ids)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids.tobytes()
