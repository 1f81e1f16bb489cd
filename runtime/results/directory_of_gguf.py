"""The files of a Hugging Face directory beside config and weights, made from a GGUF file: its tokenizer and chat
template.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from tightfit.profiles.sources.gguf_tokenizer import gguf_vocabulary
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.files import write_whole


def vocabulary_files(source: Source) -> Callable[[Path], None]:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json into a folder.

    Raises InputError for a tokenizer of another kind than those that tightfit reads.
    """
    vocabulary = gguf_vocabulary(Path(source.path))
    tokenizer = vocabulary.tokenizer
    begin = vocabulary.bos_token if vocabulary.add_bos else None
    if begin is not None:
        ids = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=ids
        )
    tokens = {
        "bos_token": vocabulary.bos_token,
        "eos_token": vocabulary.eos_token,
        "pad_token": vocabulary.pad_token,
        **vocabulary.special_tokens,
    }
    templates: str | list[dict[str, str]] | None = vocabulary.chat_template
    if vocabulary.chat_template and vocabulary.tool_template:
        templates_by_name = {"default": vocabulary.chat_template, "tool_use": vocabulary.tool_template}
        templates = [{"name": name, "template": text} for name, text in templates_by_name.items()]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.config.get("max_position_embeddings") or None,
        "chat_template": templates,
        **tokens,
    }
    ends = {key: source.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in source.config}

    def write(folder: Path) -> None:
        tokenizer.save(str(folder / "tokenizer.json"))
        settings_with_values = {name: value for name, value in settings.items() if value is not None}
        write_whole(folder / "tokenizer_config.json", json.dumps(settings_with_values, indent=1) + "\n")
        write_whole(folder / "generation_config.json", json.dumps(ends, indent=1) + "\n")

    return write
