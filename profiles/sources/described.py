"""A model as its headers describe it, without its weights: all that tracing needs, and all of a model that leaves a device which
has it traced elsewhere.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from pydantic import Field

from tightfit.profiles.schema import FrozenRecord
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import Entry

MOST_TENSORS = 1 << 16
MOST_STORED = 1 << 18
"""names of tensors in a checkpoint: a quantised matrix has several, and each may have two spellings"""
LARGEST_SIZE = 1 << 31
LONGEST_NAME = 512
"""letters of the names of models and tensors"""
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]


class PackedTensor(FrozenRecord):
    """A tensor of a model and how it is packed (`tightfit.runtime.engine.weights.layout`)."""

    shape: list[Size] = Field(min_length=1, max_length=8)
    format: Annotated[str, Field(max_length=32)]
    group: int = Field(0, ge=0, le=1 << 16)


class SourceDescription(FrozenRecord):
    """A language model: its name, its configuration, and the name, shape and packed format of every tensor."""

    name: Name
    path: Annotated[str, Field(max_length=4096)] = Field(description="what the user named, where the model lies")
    config: dict[str, Any]
    tensors: Annotated[dict[Name, PackedTensor], Field(max_length=MOST_TENSORS)]
    base: str | None = None
    embeddings: str | None = None
    note: str = ""


def described(source: Source) -> SourceDescription:
    tensors = {
        name: PackedTensor(shape=list(entry.shape), format=entry.format, group=entry.group)
        for name, entry in source.entries.items()
    }
    return SourceDescription(
        name=source.name,
        path=source.path,
        config=source.config,
        tensors=tensors,
        base=source.base,
        embeddings=source.embeddings,
        note=source.note,
    )


def described_source(description: SourceDescription) -> Source:
    """The described model, without weights. Raises InputError for a tensor that cannot be packed as it says."""
    entries = {}
    for name, tensor in description.tensors.items():
        try:
            entries[name] = Entry(name=name, shape=tuple(tensor.shape), format=tensor.format, group=tensor.group)
        except (ValueError, LookupError, ZeroDivisionError) as error:
            raise InputError(
                f"tensor {name}: {tensor.shape} in format {tensor.format!r} and groups of {tensor.group}: {error}; describe"
                " the model with the tightfit that has its weights"
            ) from error
    return Source(
        name=description.name,
        kind="described",
        path=description.path,
        config=description.config,
        fingerprint=hashlib.sha256(description.model_dump_json().encode()).hexdigest(),
        has_weights=False,
        entries=entries,
        tensors=lambda: (),
        note=description.note,
        base=description.base,
        embeddings=description.embeddings,
    )


class AnswersWanted(FrozenRecord):
    """Steps of answers: of one token and of a group of so many, whose prompts and answers have up to `longest` tokens."""

    group: int = Field(ge=2, le=1 << 12)
    longest: int = Field(ge=0, le=LARGEST_SIZE)
    instead: str = Field(
        "", max_length=LONGEST_NAME, description="what errors say to do where the decoder cannot answer"
    )


class TracingRequest(FrozenRecord):
    """A language model, and what is wanted of it: the step of training, the steps of answers, the description of its decoder, or
    several of them.
    """

    source: SourceDescription
    options: dict[str, Any] | None = Field(
        None,
        description="a step of training is wanted, with these fields of `tightfit.profiles.options.ProfileOptions`",
    )
    lora: dict[str, Any] | None = Field(
        None,
        description="the settings of an adapter that lies on the device (`tightfit.profiles.models.lora.LoraConfig`)",
    )
    answers: AnswersWanted | None = None
    stored: Annotated[list[Name], Field(max_length=MOST_STORED)] | None = Field(
        None,
        description="the description of a decoder that transformers builds is wanted; `stored` are the names in the checkpoint, and"
        " `source` needs no tensors",
    )
