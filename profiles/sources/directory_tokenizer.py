"""Reads the tokenizer of a Hugging Face directory, with its special tokens and chat templates; writes and reads what
tightfit itself keeps of a vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tightfit.profiles.sources.vocabulary import TOKENIZER, WORDS, Vocabulary, refusals
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import check_regular, read_whole
from tightfit.runtime.common.strict_json import JsonError, read_json


def directory_vocabulary(path: Path) -> Vocabulary | None:
    """The tokenizer in `path`, with special tokens and chat templates; None if there is no tokenizer.json.

    Raises InputError.
    """
    if not (path / TOKENIZER).exists():
        return None
    tokenizer = library_tokenizer(path)
    options = _json(path / "tokenizer_config.json")
    special = _special_tokens(path, options, tokenizer)
    templates = _chat_templates(path, options)
    with refusals(f"{path / TOKENIZER}: it has no tokens for a letter", "download the file again"):
        first = tokenizer.encode("a").ids[:1]
    bos = special.pop("bos_token", None)
    return Vocabulary(
        tokenizer=tokenizer,
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        bos_token=bos,
        eos_token=special.pop("eos_token", None),
        pad_token=special.pop("pad_token", None),
        add_bos=bos is not None and first == [tokenizer.token_to_id(bos)],
        special_tokens=special,
    )


def library_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in `path`, which is in memory with its whole vocabulary. Raises InputError."""
    file = path / TOKENIZER
    with refusals(f"{file}: unreadable tokenizer", "download the file again"):
        check_regular(file)
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return tokenizer


def _chat_templates(path: Path, options: dict[str, Any]) -> dict[str, str]:
    """Jinja sources by name, found as transformers does: in files of their own, else in tokenizer_config.json."""
    templates = options.get("chat_template") or {}
    if isinstance(templates, list):
        templates = {str(entry.get("name")): entry.get("template") for entry in templates if isinstance(entry, dict)}
    elif not isinstance(templates, dict):
        templates = {"default": templates}
    if damaged := next((name for name, source in templates.items() if not isinstance(source, str)), None):
        file = path / "tokenizer_config.json"
        raise InputError(f"{file}: damaged (its chat template {damaged!r} is no text); download the file again")
    files = {file.stem: file for file in (path / "additional_chat_templates").glob("*.jinja")}
    if (path / "chat_template.jinja").exists():
        files["default"] = path / "chat_template.jinja"
    for name, file in files.items():
        try:
            templates[name] = read_whole(file).decode()
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}; download the file again") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 (byte {error.start}); download the file again") from error
    return templates


def _special_tokens(path: Path, options: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens by name, from tokenizer_config.json, else special_tokens_map.json, else the token ids in the
    model's config.

    The fallbacks matter because a model without an end-of-text token would never learn to stop. If
    tokenizer_config.json says null for the beginning-of-text token, the model was trained without one, and no fallback
    is used.
    """
    tokens: dict[str, str] = {}
    config_tokens = {key: value for key, value in options.items() if value is not None or key == "bos_token"}
    for key, value in (_json(path / "special_tokens_map.json") | config_tokens).items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    for file in ("config.json", "generation_config.json"):
        config = _json(path / file)
        for key in {"bos_token", "eos_token", "pad_token"} - ({"bos_token"} & options.keys()):
            token_id = config.get(f"{key}_id")
            token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
            token = tokenizer.id_to_token(token_id) if isinstance(token_id, int) and 0 <= token_id < 1 << 32 else None
            if token is not None:
                tokens.setdefault(key, token)
    return tokens


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file. Raises InputError, naming the file, if it is damaged."""
    try:
        data = read_json(file) if file.exists() else {}
    except (OSError, JsonError) as error:
        raise InputError(f"{file}: damaged ({error}); download the file again") from error
    if not isinstance(data, dict):
        raise InputError(f"{file}: damaged (no JSON object); download the file again")
    return data


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Leave a model's tokenizer and templates in a folder."""
    words = {name: value for name, value in vars(vocabulary).items() if name != "tokenizer"}
    vocabulary.tokenizer.save(str(folder / TOKENIZER), pretty=False)
    (folder / WORDS).write_text(json.dumps(words), encoding="utf-8")


def read_vocabulary(folder: Path) -> Vocabulary:
    """What `write_vocabulary` has written. Raises InputError for damaged files."""
    words = _json(folder / WORDS)
    with refusals(f"{folder}: its vocabulary is damaged", "make the bundle again, or copy the folder again"):
        return Vocabulary(tokenizer=library_tokenizer(folder), **words)
