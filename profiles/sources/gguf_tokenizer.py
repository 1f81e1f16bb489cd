"""Reads the tokenizer inside a GGUF file as a `tokenizers.Tokenizer`.

Two kinds occur in the supported architectures: byte-level BPE (``gpt2``: merges in the file, the split pattern named by
``tokenizer.ggml.pre``) and SentencePiece BPE (``llama``: scores in the file; the merges follow from the scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from tightfit.profiles.sources.gguf_metadata import read_metadata
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS = {"qwen2": _QWEN, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3}
DIGITS = ("smollm", "refact", "starcoder", "command-r")
PLAIN = ("default", "gpt-2", "gpt2")


def gguf_vocabulary(path: Path) -> Vocabulary:
    """Build the tokenizer from ``tokenizer.*`` metadata.

    Raises InputError if the file is unreadable or the kind unsupported.
    """
    metadata = read_metadata(path)
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] | None = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise InputError(
            f"{path}: tokenizer of kind {kind!r} is not supported; supported: gpt2, llama; use the model's Hugging Face directory"
        )
    tokenizer = _byte_level(path, metadata, tokens) if kind == "gpt2" else _sentence_piece(metadata, tokens)
    types = metadata.get("tokenizer.ggml.token_type") or []
    added = [
        AddedToken(token, special=token_type == CONTROL, normalized=False)
        for token, token_type in zip(tokens, types)
        if token_type in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])

    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None and 0 <= index < len(tokens) else None

    add_bos = bool(
        metadata.get(
            "tokenizer.ggml.add_bos_token",
            kind == "llama" or metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3"),
        )
    )
    unknown = token("unknown")
    return Vocabulary(
        tokenizer=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        tool_template=metadata.get("tokenizer.chat_template.tool_use"),
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        add_bos=add_bos and token("bos") is not None,
        special_tokens={"unk_token": unknown} if unknown else {},
    )


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    split = metadata.get("tokenizer.ggml.pre", "default")
    ids = {token: index for index, token in enumerate(tokens)}
    merges = []
    for merge in metadata.pop("tokenizer.ggml.merges", []):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= ids.keys():  # the tokenizers library would abort on it
            raise InputError(f"{path}: merge {merge!r} names no token; the file is damaged, download it again")
        merges.append((tokens[ids[left]], tokens[ids[right]]))  # reuses the strings, which saves memory
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=split in ("llama-bpe", "llama3", "llama-v3")))
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
            f"{path}: pre-tokenizer {split!r} is not supported; supported: {known}; use the model's Hugging Face directory"
        )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    ids = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        BPE(ids, implied_merges(ids, scores), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return tokenizer


def implied_merges(ids: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE: every split of a token into two tokens, best score first, then lowest ids."""
    tokens = {index: token for token, index in ids.items()}
    merges: list[Any] = []
    for token, index in ids.items():
        rank = -scores[index]
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(rank, ids[left], ids[right]) for left, right in pairs if left in ids and right in ids]
    merges.sort()
    for index, (_, left, right) in enumerate(merges):  # replaced in place: there may be half a million
        merges[index] = tokens[left], tokens[right]
    return merges
