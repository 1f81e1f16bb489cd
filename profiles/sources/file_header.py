"""A model from what the header of its file says, sent by somebody who keeps the file: its configuration and its precision.

The code that opens GGUF files makes both, and refuses what it would refuse of the file itself. A safetensors file does not say how a
model computes; its config.json does.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any

from pydantic import Field

from tightfit.profiles.models.decoder_config import LARGEST
from tightfit.profiles.options import Bits
from tightfit.profiles.schema import FrozenRecord
from tightfit.profiles.sources.described import LONGEST_NAME, MOST_TENSORS, Name, Size
from tightfit.profiles.sources.gguf_config import config_from_metadata
from tightfit.profiles.sources.gguf_metadata import GgufEntry
from tightfit.profiles.sources.gguf_source import matched_tensors
from tightfit.profiles.weights.describe import EMBEDDINGS
from tightfit.profiles.weights.precision import Precision, bits
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import Entry

ARCHITECTURE = "general.architecture"
MOST_VALUES = 1 << 12
LONGEST_VALUE = 1 << 17
"""letters of a text among the metadata: chat templates are long"""


class HeaderTensor(FrozenRecord):
    shape: list[Size] = Field(min_length=1, max_length=8, description="as the header has it: of GGUF, columns first")
    format: str = Field(max_length=32, description="the type's name, such as Q4_1 or BF16")


class FileHeader(FrozenRecord):
    """The header of a GGUF or safetensors file, without lists among its metadata."""

    metadata: Annotated[
        dict[Name, bool | int | float | Annotated[str, Field(max_length=LONGEST_VALUE)]],
        Field(max_length=MOST_VALUES),
    ]
    tensors: Annotated[dict[Name, HeaderTensor], Field(max_length=MOST_TENSORS)]


def model_of_header(header: FileHeader, precision: Precision) -> tuple[dict[str, Any], Bits | None, Bits | None]:
    """The configuration of the model, and the precision of its matrices and of embedding and head, where the file has a choice made.

    Raises InputError for a header that is of no decoder, or does not fit together.
    """
    if ARCHITECTURE not in header.metadata:
        raise InputError(
            "the header does not say what the model is, as that of a safetensors file; choose its config.json, which says it, too"
        )
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
