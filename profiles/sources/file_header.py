"""A model from what the header of its file says, sent by somebody who keeps the file: its configuration and its
precision.

The code that opens GGUF files makes both, and refuses what it would refuse of the file itself. A safetensors file has
the names and shapes of tensors alone: they tell Llama, Qwen2, Qwen3 and Gemma 3 apart, and all sizes but that of a head
where heads have no norm, for which the family's usual size is taken. What only config.json says (how positions turn,
windows) changes no bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from tightfit.profiles.models.decoder_config import LARGEST, decoder_shape
from tightfit.profiles.options import Bits
from tightfit.profiles.schema import FrozenRecord
from tightfit.profiles.sources.bundle import LONGEST_NAME, Name
from tightfit.profiles.sources.gguf_config import config_from_metadata
from tightfit.profiles.sources.gguf_metadata import GgufEntry
from tightfit.profiles.sources.gguf_source import matched_tensors
from tightfit.profiles.sources.huggingface import text_name
from tightfit.profiles.weights.describe import EMBEDDINGS, decoder_tensors
from tightfit.profiles.weights.precision import Precision, bits
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import Entry

ARCHITECTURE = "general.architecture"
LAYER = "model.layers.0."
EXPERT = re.compile(r"\.experts\.(\d+\.)?(gate|up|down|w\d)")
NUMBERED = re.compile(r"model\.layers\.(\d{1,4})\.")
LARGEST_OF_SMALL_HEADS = {"llama": 2048, "qwen2": 1024, "qwen3": 0, "gemma3_text": 0}
"""family -> hidden size up to which published models have heads of 64 numbers; above it, of 128"""
INSTEAD = "it is one of several files, or of another family: choose the model's config.json"
MOST_TENSORS, LARGEST_SIZE = 1 << 16, 1 << 31
MOST_VALUES = 1 << 12
LONGEST_VALUE = 1 << 17
"""letters of a text among the metadata: chat templates are long"""


class HeaderTensor(FrozenRecord):
    shape: list[Annotated[int, Field(ge=1, le=LARGEST_SIZE)]] = Field(
        min_length=1, max_length=8, description="as the header has it: of GGUF, columns first"
    )
    format: str = Field(max_length=32, description="the type's name, such as Q4_1 or BF16")


class FileHeader(FrozenRecord):
    """The header of a GGUF or safetensors file, without lists among its metadata."""

    metadata: Annotated[
        dict[Name, bool | int | float | Annotated[str, Field(max_length=LONGEST_VALUE)]],
        Field(max_length=MOST_VALUES),
    ]
    tensors: Annotated[dict[Name, HeaderTensor], Field(max_length=MOST_TENSORS)]


def model_of_header(header: FileHeader, precision: Precision) -> tuple[dict[str, Any], Bits | None, Bits | None]:
    """The configuration of the model, and the precision of its matrices and of embedding and head, where the file has a
    choice made.

    Raises InputError for a header that is of no decoder, or does not fit together.
    """
    if ARCHITECTURE not in header.metadata:
        return _config_of_tensors({text_name(name): tuple(t.shape) for name, t in header.tensors.items()}), None, None
    tensors = {
        name: GgufEntry(name=name, kind=tensor.format, shape=tuple(reversed(tensor.shape)), start=0, bytes=0)
        for name, tensor in header.tensors.items()
    }
    tensors.pop("rope_freqs.weight", None)  # how positions turn changes neither bytes nor seconds
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError("no tensor 'token_embd.weight'; only language models can be used")
    layers = header.metadata.get(f"{header.metadata[ARCHITECTURE]}.block_count")
    if isinstance(layers, int) and layers > LARGEST["num_hidden_layers"]:
        raise InputError(f"{layers} layers; at most {LARGEST['num_hidden_layers']} are supported")
    try:
        config = config_from_metadata(
            dict(header.metadata), vocabulary=embedding.shape[0], tied="output.weight" not in tensors, rope_factors=None
        )
        pairs = matched_tensors(config, tensors, precision)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the header's metadata do not fit together ({error}); read the file again") from error
    name = header.metadata.get("general.name")
    if isinstance(name, str) and name.strip():
        config["_name_or_path"] = name[:LONGEST_NAME]
    matrices = [entry for entry, _ in pairs if len(entry.shape) > 1]
    return config, _most(matrices, embeddings=False), _most(matrices, embeddings=True)


def _config_of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of the decoder whose tensors have these names and shapes. Raises InputError for what is
    none.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise InputError(f"no tensor {name!r} in the header; {INSTEAD}")
        return shapes[name]

    def rows(name: str) -> int:
        return shape(f"{LAYER}{name}.weight")[0]

    if expert := next((name for name in shapes if EXPERT.search(name)), None):
        raise InputError(
            f"tensor {expert} is of a mixture of experts, and a header does not say through how many a token goes; give"
            " the config.json"
        )
    vocabulary, hidden = (*shape("model.embed_tokens.weight"), 0)[:2]
    biased, normed = f"{LAYER}self_attn.q_proj.bias" in shapes, f"{LAYER}self_attn.q_norm.weight" in shapes
    gemma = f"{LAYER}pre_feedforward_layernorm.weight" in shapes
    family = "gemma3_text" if gemma else "qwen3" if normed else "qwen2" if biased else "llama"
    head = rows("self_attn.q_norm") if normed else 64 if hidden <= LARGEST_OF_SMALL_HEADS[family] else 128
    layers = {int(match[1]) for name in shapes if (match := NUMBERED.match(name))}
    config = {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": rows("mlp.gate_proj"),
        "num_hidden_layers": len(layers),
        "num_attention_heads": rows("self_attn.q_proj") // head,
        "num_key_value_heads": rows("self_attn.k_proj") // head,
        "head_dim": head,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }
    due = dict(decoder_tensors(decoder_shape(config)))
    for name, due_shape in due.items():
        if shape(name) != due_shape:
            raise InputError(f"tensor {name} has shape {list(shapes[name])} where {list(due_shape)} is due; {INSTEAD}")
    more = next((name for name in shapes if NUMBERED.match(name) and name not in due and "inv_freq" not in name), None)
    if more is not None:
        raise InputError(f"tensor {more} belongs to no {family} decoder; {INSTEAD}")
    return config


def _most(matrices: list[Entry], *, embeddings: bool) -> Bits | None:
    """The choice that comes nearest to how most of these weights are stored."""
    weights: Counter[str] = Counter()
    for entry in matrices:
        if (entry.name in EMBEDDINGS) == embeddings:
            weights[bits(entry)] += math.prod(entry.shape)
    if not weights:
        return None
    stored = int(weights.most_common(1)[0][0].removesuffix("bit"))
    return "4bit" if stored < 6 else "8bit" if stored < 12 else "16bit"
