"""The bytes of each token of a vocabulary, found from its tokenizer's decoder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.supervision.token_text import NO_SPACE, ONE_SPACE, SPACES_OF_FIRST

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(vocabulary: Vocabulary, vocab_size: int, *, special: bool = False) -> tuple[Iterator[bytes], int]:
    """(bytes of each of the model's `vocab_size` tokens, what a text does not begin with: `NO_SPACE`, `ONE_SPACE` or
    `SPACES_OF_FIRST`).

    Special tokens have none, as where they are skipped in decoding, or with `special` their names. Raises InputError
    for a tokenizer whose decoder is neither byte-level nor that of SentencePiece.
    """
    decoder = vocabulary.tokenizer.decoder
    steps = _steps(None if decoder is None else json.loads(decoder.__getstate__()))  # noqa: TID251  written by the library
    kinds = [step["type"] for step in steps]
    omitted = NO_SPACE
    if kinds == ["ByteLevel"]:
        codes = _byte_level()

        def piece(token: str) -> bytes:
            return (
                bytes(codes[letter] for letter in token) if all(letter in codes for letter in token) else token.encode()
            )

    elif kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        marks = [_mark(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
        omitted = max(map(_left_out, steps))

        def piece(token: str) -> bytes:
            if "ByteFallback" in kinds and (match := _BYTE.fullmatch(token)):
                return bytes([int(match[1], 16)])
            for mark, replacement in marks:
                token = token.replace(mark, replacement)
            return token.encode()

    else:
        raise InputError(
            f"the tokenizer decodes with {', '.join(kinds) or 'nothing'}, which tightfit cannot show token by token;"
            " merge the adapter and generate with llama.cpp or transformers"
        )
    added = vocabulary.tokenizer.get_added_tokens_decoder()

    def pieces() -> Iterator[bytes]:
        for number in range(vocab_size):
            token = vocabulary.tokenizer.id_to_token(number)
            if token is None or (not special and number in added and added[number].special):
                yield b""
            else:
                yield token.encode() if number in added else piece(token)

    return pieces(), omitted


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _mark(step: dict[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    return step["pattern"].get("String", ""), step["content"]


def _left_out(step: dict[str, Any]) -> int:
    """Which blanks a step of the decoder removes from the start of a text."""
    if step["type"] == "Metaspace" and step.get("prepend_scheme") != "never":
        return SPACES_OF_FIRST
    return ONE_SPACE if step["type"] == "Strip" and step["content"] == " " and step["start"] else NO_SPACE


def _byte_level() -> dict[str, int]:
    """For each letter by which byte-level tokenizers, as GPT-2's, write a byte: that byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
