"""Reads the tokenizer inside a GGUF file.

Two kinds occur in the supported architectures: byte-level BPE (``gpt2``: merges in the file, the split pattern named by
``tokenizer.ggml.pre``) and SentencePiece BPE (``llama``: scores in the file; the merges follow from the scores).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from tightfit.profiles.sources.gguf_metadata import read_metadata
from tightfit.profiles.sources.vocabulary import Vocabulary, refusals
from tightfit.runtime.common.errors import InputError

AGAIN = "the file is damaged, download it again"
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
SPLITS = {"qwen2": _QWEN} | dict.fromkeys(LLAMA3, _LLAMA3)
DIGITS = ("smollm", "refact", "starcoder", "command-r")
PLAIN = ("default", "gpt-2", "gpt2")


def gguf_vocabulary(path: Path) -> Vocabulary:
    """Build the tokenizer from ``tokenizer.*`` metadata. Raises InputError if the file is unreadable or the kind
    unsupported.
    """
    metadata = read_metadata(path)
    tokens = _tokens(path, metadata)

    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None and 0 <= index < len(tokens) else None

    with refusals(f"{path}: unreadable tokenizer", AGAIN):
        add_bos = bool(
            metadata.get(
                "tokenizer.ggml.add_bos_token",
                metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3,
            )
        )
        unknown = token("unknown")
        return Vocabulary(
            tokenizer=gguf_tokenizer(path),
            chat_template=metadata.get("tokenizer.chat_template"),
            tool_template=metadata.get("tokenizer.chat_template.tool_use"),
            bos_token=token("bos"),
            eos_token=token("eos"),
            pad_token=token("padding"),
            add_bos=add_bos and token("bos") is not None,
            special_tokens={"unk_token": unknown} if unknown else {},
        )


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer, which is in memory with its whole vocabulary. Raises InputError as `gguf_vocabulary` does."""
    metadata = read_metadata(path)
    tokens = _tokens(path, metadata)
    tokenizer = _pipeline(path, metadata)
    ids = {token: index for index, token in enumerate(tokens)}
    merges = []
    for left, right in _merges(metadata, ids):
        if not {left, right, left + right} <= ids.keys():  # the tokenizers library would abort on it
            raise InputError(
                f"{path}: merge {f'{left} {right}'!r} names no token; the file is damaged, download it again"
            )
        merges.append((left, right))
    with refusals(f"{path}: unreadable tokenizer", AGAIN):
        tokenizer.model = BPE(ids, merges, **_settings(metadata, tokens))
        added = list(_added(metadata, tokens))
        tokenizer.add_special_tokens([token for token in added if token.special])
        tokenizer.add_tokens([token for token in added if not token.special])
    return tokenizer


def _tokens(path: Path, metadata: Mapping[str, Any]) -> Sequence[str]:
    """The vocabulary, by id. Raises InputError for a tokenizer of another kind."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens: Sequence[str] | None = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise InputError(
            f"{path}: tokenizer of kind {kind!r} is not supported; supported: gpt2, llama; use the model's Hugging Face"
            " directory"
        )
    return tokens


def _added(metadata: Mapping[str, Any], tokens: Iterable[str]) -> Iterator[AddedToken]:
    """The tokens that are found in a text before it is split into words."""
    for token, token_type in zip(tokens, metadata.get("tokenizer.ggml.token_type") or ()):
        if token_type in (CONTROL, USER_DEFINED):
            yield AddedToken(token, special=token_type == CONTROL, normalized=False)


def _settings(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """What the model does beside its merges."""
    if metadata["tokenizer.ggml.model"] == "gpt2":
        return {"ignore_merges": metadata.get("tokenizer.ggml.pre") in LLAMA3}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    return {"unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True}


def _merges(metadata: Mapping[str, Any], ids: dict[str, int]) -> Iterator[tuple[str, str]]:
    if metadata["tokenizer.ggml.model"] == "llama":
        yield from implied_merges(ids, metadata.get("tokenizer.ggml.scores") or [0.0] * len(ids))
        return
    for merge in metadata.get("tokenizer.ggml.merges", ()):
        left, _, right = merge.partition(" ")
        yield left, right


def _pipeline(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer without its vocabulary. Raises InputError for one that splits texts in an unknown way."""
    tokenizer = Tokenizer(BPE())
    if metadata["tokenizer.ggml.model"] == "llama":
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        tail: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
        )
        return tokenizer
    split = metadata.get("tokenizer.ggml.pre", "default")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    if split in SPLITS:
        pattern = pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pattern, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
        )
    elif split in DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=prefix)])
    elif split in PLAIN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        known = ", ".join((*SPLITS, *DIGITS, *PLAIN))
        raise InputError(
            f"{path}: pre-tokenizer {split!r} is not supported; supported: {known}; use the model's Hugging Face"
            " directory"
        )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def implied_merges(ids: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """The merges of a SentencePiece BPE: every split of a token into two tokens, best score first, then lowest ids."""
    best_first = sorted(ids, key=lambda token: -scores[ids[token]])
    for _, equal in itertools.groupby(best_first, key=lambda token: scores[ids[token]]):
        splits = ((token[:cut], token[cut:]) for token in equal for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in ids and right in ids]
        yield from sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
