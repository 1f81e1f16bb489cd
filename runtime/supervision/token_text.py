"""Turns tokens into text one after the other, by a table on disk instead of a tokenizer, which takes a few bytes of
memory.

The table begins with the number of tokens and with which spaces are left out at the start of a text (uint32 each), then
has the end of each token's bytes (uint32) and the bytes themselves. The standard library only.
"""

from __future__ import annotations

import codecs
import os
import struct
from array import array
from collections.abc import Iterable

HEAD = struct.Struct("<II")
WIDTH = 4
NO_SPACE, ONE_SPACE, SPACES_OF_FIRST = 0, 1, 2
"""What is left out at the start of a text: nothing, one space, or every space of its first token."""


def write_table(path: str, pieces: Iterable[bytes], left_out: int) -> None:
    """Write the table of tokens whose bytes are `pieces`; `left_out` is what a text does not begin with."""
    ends, text = array("I"), bytearray()
    for piece in pieces:
        text += piece
        ends.append(len(text))
    with open(path, "wb") as file:
        file.write(HEAD.pack(len(ends), left_out))
        ends.tofile(file)
        file.write(text)


class TokenText:
    """Turns tokens into text by the table at `path`."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.count, self._left_out = HEAD.unpack(os.pread(self._descriptor, HEAD.size, 0))
        self.begin()

    def begin(self) -> None:
        """Start a new text."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._fresh = True

    def add(self, token: int) -> str:
        """The text that a token completes; a character may take several."""
        data = self.bytes_of(token)
        if self._fresh and data:
            self._fresh = False
            if self._left_out == ONE_SPACE:
                data = data.removeprefix(b" ")
            elif self._left_out == SPACES_OF_FIRST:
                data = data.replace(b" ", b"")
        return self._decoder.decode(data)

    def end(self) -> str:
        """What is left of the text: a sign for a character that is not complete."""
        return self._decoder.decode(b"", True)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none for one that the tokenizer does not know."""
        if not 0 <= token < self.count:
            return b""
        offset = HEAD.size + WIDTH * (token - 1 if token else 0)
        edges = os.pread(self._descriptor, WIDTH * (2 if token else 1), offset)
        begin, end = struct.unpack("<II", edges) if token else (0, *struct.unpack("<I", edges))
        return os.pread(self._descriptor, end - begin, HEAD.size + WIDTH * self.count + begin)

    def close(self) -> None:
        os.close(self._descriptor)
