"""How much a process holds once it has loaded a tokenizer: what the last one held, by the digest of the tokenizer's
file, and before the first time what the number and length of the texts in that file make likely at most.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tightfit.profiles.sources.gguf_metadata import read_with_digest
from tightfit.profiles.sources.tokenizer_file import TokenizerFile
from tightfit.profiles.sources.vocabulary import TOKENIZER
from tightfit.runtime.common.cache import cache_place, keep, kept
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import open_regular
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.common.units import MIB

PROCESS_BYTES = 32 * MIB
"""Most that a process holds once the library is imported, before it loads a tokenizer."""
TEXT_BYTES = 400
"""Most that loading takes for each text of a file, tokens and both sides of merges: 215 to 360 were measured, of byte
pairs and word pieces, from 30,000 to 500,000 tokens.
"""
BYTES_PER_BYTE = 1
"""That loading takes for each byte of a tokenizer.json, which is read as a whole."""
PREFIX_BYTES = 350
"""Most that each byte of a token takes where the library keeps the beginnings of tokens, as it does for unigram
models.
"""
GGUF_BYTES_PER_BYTE = 4
"""Most that each byte of a GGUF file's header takes, whose texts are Python's for a while."""
MERGES_PER_TOKEN = 2
"""Merges that follow from the scores of a SentencePiece vocabulary, for each token: the file has no list of them."""
BLOCK = 1 << 16
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_UNIGRAM = b'"Unigram"'


@dataclass(frozen=True, kw_only=True)
class KnownMemory:
    """What is known of the memory that a tokenizer takes."""

    bytes: int
    """that a process is predicted to hold once it has loaded the tokenizer, most of them at one moment"""
    measured: bool
    """whether one has held so many before"""
    place: Path
    """where what one has held is kept"""

    @classmethod
    def of(cls, file: TokenizerFile) -> KnownMemory:
        """Raises InputError for a file that cannot be read."""
        path = Path(file.path)
        digest, computed_bytes = _of_gguf(path) if file.kind == "gguf" else _of_json(path / TOKENIZER)
        place = cache_place("tokenizers", digest, version("tokenizers"))
        measured_bytes = kept(place, _peak)
        return cls(
            bytes=computed_bytes if measured_bytes is None else measured_bytes,
            measured=measured_bytes is not None,
            place=place,
        )

    def keep(self, peak_bytes: int) -> None:
        """Keep what a process has held, unless that is known."""
        if not self.measured:
            keep(self.place, json.dumps({"peak_bytes": peak_bytes}))


def _peak(content: bytes) -> int:
    """Bytes in a file of the cache. Raises ValueError for a damaged one."""
    match from_json(content):
        case {"peak_bytes": int(peak_bytes)}:
            return peak_bytes
    raise ValueError("no peak")


def _of_gguf(path: Path) -> tuple[str, int]:
    """(a digest of the header, bytes that a process takes at most to load the tokenizer in it)."""
    metadata, digest, size = read_with_digest(path)
    lists = [metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges")]
    tokens, merges = (len(texts) if isinstance(texts, Sequence) else 0 for texts in lists)
    merges = merges or MERGES_PER_TOKEN * tokens
    return digest, PROCESS_BYTES + TEXT_BYTES * (tokens + merges) + GGUF_BYTES_PER_BYTE * size


def _of_json(file: Path) -> tuple[str, int]:
    """(a digest of a tokenizer.json, bytes that a process takes at most to load it). The file is read in pieces."""
    digest, size, texts, text_bytes = hashlib.sha256(), 0, 0, 0
    inside = unigram = False
    before = edge = b""
    """the end of the last piece, where an escape may have begun, and a name"""
    try:
        with open_regular(file) as content:
            while block := content.read(BLOCK):
                digest.update(block)
                size += len(block)
                unigram = unigram or _UNIGRAM in edge + block
                edge = block[-len(_UNIGRAM) :]
                plain = _ESCAPED.sub(b".", before + block)
                before = b"\\" if plain.endswith(b"\\") else b""
                pieces = plain.removesuffix(before).split(b'"')
                text_bytes += sum(map(len, pieces[0 if inside else 1 :: 2]))
                texts += len(pieces) - 1
                inside = inside != (len(pieces) % 2 == 0)
    except OSError as error:
        raise InputError(f"{file}: unreadable tokenizer ({error.strerror}); download the file again") from error
    needed_bytes = PROCESS_BYTES + TEXT_BYTES * texts // 2 + BYTES_PER_BYTE * size
    return digest.hexdigest(), needed_bytes + (PREFIX_BYTES * text_bytes if unigram else 0)
