"""Reads a tokenizer.json for its table: entry by entry, since the vocabulary as Python's objects takes ten times the file."""

from __future__ import annotations

import mmap
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from tightfit.profiles.token_tables.table_file import SETTINGS, NoTableError, TableParts
from tightfit.runtime.common.files import open_regular
from tightfit.runtime.common.strict_json import JsonError, from_json

_STRING = rb'"(?:[^"\\]|\\.)*+"'
_BLANK = rb"[ \t\r\n]*+"
_FLAT = re.compile(rb'(?:[^"{}\[\]]|' + _STRING + rb")*+", re.DOTALL)
"""up to the next bracket"""
_SCALAR = re.compile(rb"(?:" + _STRING + rb"|[^\s,\]}\"{\[]++)", re.DOTALL)
_SPACES = re.compile(_BLANK)
_NAME = re.compile(rb"(" + _STRING + rb")" + _BLANK + rb":" + _BLANK, re.DOTALL)
_TOKEN = re.compile(
    rb"(" + _STRING + rb")" + _BLANK + rb":" + _BLANK + rb"([0-9]{1,10})" + _BLANK + rb",?+" + _BLANK, re.DOTALL
)
_MERGE = re.compile(
    rb"(?:(" + _STRING + rb")|\[" + _BLANK + rb"(" + _STRING + rb")" + _BLANK + rb"," + _BLANK + rb"(" + _STRING + rb")"
    + _BLANK + rb"\])" + _BLANK + rb",?+" + _BLANK,
    re.DOTALL,
)  # fmt: skip
_SCORE = re.compile(
    rb"\[" + _BLANK + rb"(" + _STRING + rb")" + _BLANK + rb"," + _BLANK + rb"(-?[0-9.eE+-]{1,40})" + _BLANK + rb"\]"
    + _BLANK + rb",?+" + _BLANK,
    re.DOTALL,
)  # fmt: skip
LARGE = {"BPE": {"vocab", "merges"}, "WordPiece": {"vocab"}, "Unigram": {"vocab"}}
"""kind of a model -> what of it is read entry by entry"""
_KIND = re.compile(
    rb'"model"' + _BLANK + rb":" + _BLANK + rb"\{" + _BLANK + rb'"type"' + _BLANK + rb":" + _BLANK + rb'"(\w+)"'
)
BLOCK, LONGEST_KIND = 1 << 16, 200
BYTES_PER_BYTE = {b"BPE": 4, b"WordPiece": 15, b"Unigram": 8}
"""Most bytes that each byte of a tokenizer.json takes while its table is made, the file's own included, which is mapped then: measured
3.2 with Gemma 3's BPE, 12.4 and 6.9 with 200,000 tokens of up to nine letters."""
Span = tuple[int, int]


def json_parts(path: Path) -> TableParts:
    """What the table of a tokenizer.json is made of.

    Raises NoTableError for a tokenizer of another kind or a damaged one, OSError if it cannot be read.
    """
    with open_regular(path) as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        whole = dict(_members(text, _skip_blanks(text, 0)))
        if "model" not in whole:
            raise NoTableError("no model")
        spans = dict(_members(text, whole["model"][0]))
        large = {name: spans.pop(name) for name in ("vocab", "merges") if name in spans}
        model = {name: from_json(text[begin:end]) for name, (begin, end) in spans.items()}
        kind = str(model.get("type", "BPE"))  # files of before 2022 do not name the kind; merges are BPE's
        if model.get("dropout") is not None or LARGE.get(kind) != large.keys():
            raise NoTableError(f"a model of kind {kind!r}")
        pipeline: dict[str, Any] = {
            name: from_json(text[begin:end]) for name, (begin, end) in whole.items() if name != "model"
        }
        names = {field.name for field in fields(SETTINGS[kind])}
        scores = array("d")
        return TableParts(
            pipeline={"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
            | {"added_tokens": pipeline.get("added_tokens") or []}
            | pipeline
            | {"truncation": None, "padding": None},
            settings=SETTINGS[kind](**{name: value for name, value in model.items() if name in names}),
            ids=_scored_tokens(text, large["vocab"], scores)
            if kind == "Unigram"
            else dict(_tokens(text, large["vocab"])),
            merges=_merges(text, large["merges"]) if kind == "BPE" else (),
            scores=scores,
        )
    except (JsonError, ValueError, TypeError, KeyError) as error:
        raise NoTableError(f"not read ({error})") from error


def vocabulary_bytes(path: Path) -> int:
    """Most bytes that the vocabulary takes while its table is made. Raises OSError."""
    kind, before = b"BPE", b""
    with open_regular(path) as file:
        while block := file.read(BLOCK):  # mapped as a whole, the file would count as this process's memory
            if found := _KIND.search(before + block):
                kind = found[1]
                break
            before = block[-LONGEST_KIND:]
        size = os.fstat(file.fileno()).st_size
    return BYTES_PER_BYTE.get(kind, BYTES_PER_BYTE[b"BPE"]) * size


def _members(text: mmap.mmap, begin: int) -> Iterator[tuple[str, Span]]:
    """(name, where its value stands) of each member of the object that begins there."""
    if text[begin : begin + 1] != b"{":
        raise NoTableError(f"no object at byte {begin}")
    at = _skip_blanks(text, begin + 1)
    while text[at : at + 1] != b"}":
        name = _NAME.match(text, at)
        if name is None:
            raise NoTableError(f"no name at byte {at}")
        end = _value_end(text, name.end())
        yield _string(name[1]), (name.end(), end)
        at = _skip_blanks(text, end)
        if text[at : at + 1] == b",":
            at = _skip_blanks(text, at + 1)
        elif text[at : at + 1] != b"}":
            raise NoTableError(f"neither a comma nor an end at byte {at}")


def _value_end(text: mmap.mmap, begin: int) -> int:
    """Where the value ends that begins there."""
    if text[begin : begin + 1] not in (b"{", b"["):
        scalar = _SCALAR.match(text, begin)
        if scalar is None:
            raise NoTableError(f"no value at byte {begin}")
        return scalar.end()
    depth, at = 0, begin
    while True:
        bracket = text[at : at + 1]
        if not bracket or bracket == b'"':
            raise NoTableError("cut off")
        depth += 1 if bracket in (b"{", b"[") else -1
        at += 1
        if not depth:
            return at
        flat = _FLAT.match(text, at)
        assert flat is not None
        at = flat.end()


def _tokens(text: mmap.mmap, span: Span) -> Iterator[tuple[str, int]]:
    return ((_string(match[1]), int(match[2])) for match in _entries(text, span, _TOKEN))


def _scored_tokens(text: mmap.mmap, span: Span, scores: array[float]) -> dict[str, int]:
    """The tokens of a unigram model with their ids, which are their places in the list; their scores are added to `scores`."""
    ids: dict[str, int] = {}
    for match in _entries(text, span, _SCORE):
        ids[_string(match[1])] = len(scores)
        scores.append(float(match[2]))
    if len(ids) < len(scores):
        raise NoTableError("a token is listed twice")
    return ids


def _merges(text: mmap.mmap, span: Span) -> Iterator[tuple[str, str]]:
    """The merges, which older files write as one text each."""
    for match in _entries(text, span, _MERGE):
        if match[1] is None:
            yield _string(match[2]), _string(match[3])
            continue
        line = _string(match[1])
        if line.startswith("#version"):
            continue
        left, *others = line.split(" ")
        if len(others) != 1:
            raise NoTableError(f"the merge {line!r} is not of two tokens")
        yield left, others[0]


def _entries(text: mmap.mmap, span: Span, pattern: re.Pattern[bytes]) -> Iterator[re.Match[bytes]]:
    """The entries of an object or a list, each with the comma behind it."""
    begin, end = span
    at = _skip_blanks(text, begin + 1)
    while at < end - 1:
        match = pattern.match(text, at, end - 1)
        if match is None:
            raise NoTableError(f"an entry of another form at byte {at}")
        yield match
        at = match.end()


def _skip_blanks(text: mmap.mmap, at: int) -> int:
    blanks = _SPACES.match(text, at)
    assert blanks is not None
    return blanks.end()


def _string(quoted: bytes) -> str:
    if b"\\" in quoted:
        text: str = from_json(quoted)
        text.encode()  # refuses half of a pair of surrogates, as the library does
        return text
    return quoted[1:-1].decode()
