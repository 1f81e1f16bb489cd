"""A prepared model: a folder with a traced step, and what a small device needs beside its data to train it.

    prepared.json      the step, and the model and options that it was traced for (`PreparedModel`), with a checksum
    vocabulary.json,   the vocabulary (`tightfit.profiles.sources.directory_tokenizer.write_vocabulary`), where the model has one
    tokenizer.json
    weights.store      the packed weights, where they were asked for

`tightfit prepare` writes it on a machine that can trace the model. Where it has no weights, the device packs its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.profiles.models.decoder_facts import DecoderFacts
from tightfit.profiles.schema import PROFILE_VERSION, FrozenRecord, TracedStep
from tightfit.profiles.sources.described import TracingRequest, described_source
from tightfit.profiles.sources.random_weights import random_source
from tightfit.profiles.sources.transformers_source import any_random_source
from tightfit.profiles.sources.vocabulary import TOKENIZER, WORDS, Vocabulary
from tightfit.profiles.weights.precision import precision
from tightfit.profiles.weights.source import PREPARED, Source
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import of_another_version, read_whole, write_whole
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import JsonError, from_json
from tightfit.runtime.engine.weights.layout import read_header

WEIGHTS = "weights.store"
BEGIN, END = ', "prepared": ', "}\n"
"""what stands around the text of which there is a checksum"""
AGAIN = "prepare the model again with `tightfit prepare`, or copy the folder again"


class PreparedModel(FrozenRecord):
    """What was traced, and what it was traced for."""

    version: int = PROFILE_VERSION
    request: TracingRequest
    step: TracedStep | None = None
    """a step of training, where it was asked for"""
    weights: Literal["here", "elsewhere", "random"]
    """here: in the folder; elsewhere: the device names the model's own files; random: a bare config has none"""
    answers: AnswerSteps | None = None
    """the steps of answers, where they were asked for and the decoder has them"""
    decoder: DecoderFacts | None = None
    """what a decoder that transformers builds consists of"""

    @property
    def training(self) -> TracedStep:
        """The step of training. Raises InputError where none was traced."""
        if self.step is None:
            raise InputError(f"{self.request.source.name}: no step of training was traced; {AGAIN}")
        return self.step


def prepared_json(prepared: PreparedModel) -> str:
    """The content of `PREPARED`."""
    text = prepared.model_dump_json()
    return json.dumps({"checksum": hashlib.sha256(text.encode()).hexdigest()})[:-1] + f"{BEGIN}{text}{END}"


def parse_prepared(content: bytes, name: str) -> PreparedModel:
    """Raises InputError for what is not such a file, damaged, or of another version; `name` is what messages call it."""
    try:
        data = from_json(content)
    except JsonError as error:
        raise InputError(f"{name}: not JSON, perhaps cut off ({error}); {AGAIN}") from error
    if not isinstance(data, dict) or not isinstance(data.get("prepared"), dict):
        raise InputError(f"{name}: no prepared model; {AGAIN}")
    version = data["prepared"].get("version")
    if version != PROFILE_VERSION:
        raise InputError(f"{name}: {of_another_version('prepared model', version, PROFILE_VERSION)}; {AGAIN}")
    try:
        prepared = PreparedModel.model_validate(data["prepared"])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{name}: field {field}: {first['msg']} (got {str(first['input'])[:60]!r}); {AGAIN}"
        ) from error
    text = content.partition(BEGIN.encode())[2].removesuffix(END.encode())
    if data.get("checksum") != hashlib.sha256(text).hexdigest():
        raise InputError(f"{name}: its content does not match its checksum: changed or damaged; {AGAIN}")
    return prepared


def is_prepared(folder: Path) -> bool:
    return (folder / PREPARED).is_file()


def load_prepared(folder: str | os.PathLike[str]) -> PreparedModel:
    """Raises InputError for a folder that is no prepared model."""
    path = Path(folder) / PREPARED
    try:
        content = read_whole(path)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; make a prepared model with `tightfit prepare MODEL -o {folder}`"
        ) from error
    return parse_prepared(content, str(path))


def save_prepared(prepared: PreparedModel, folder: Path, store: Path | None, vocabulary: Vocabulary | None) -> None:
    """Write a prepared model, with a copy of the packed weights in `store` and of the vocabulary. What the folder held of an earlier one is replaced.

    Raises InputError for a folder that cannot be written, RunError if the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PREPARED).unlink(missing_ok=True)  # until all is there
        for name in (WEIGHTS, TOKENIZER, WORDS):
            (folder / name).unlink(missing_ok=True)
        if vocabulary is not None:
            from tightfit.profiles.sources.directory_tokenizer import write_vocabulary

            write_vocabulary(folder, vocabulary)
        if store is not None:
            partial = folder / f".{WEIGHTS}.partial"
            shutil.copyfile(store, partial)
            partial.replace(folder / WEIGHTS)
    except OSError as error:
        error_type = RunError if store is not None else InputError
        raise error_type(
            f"{error.filename or folder}: {error.strerror}; free some space or choose another folder"
        ) from error
    write_whole(folder / PREPARED, prepared_json(prepared))


def prepared_source(folder: Path) -> Source:
    """The model in a prepared folder. Raises InputError where its weights are elsewhere."""
    prepared = load_prepared(folder)
    if prepared.weights == "elsewhere":
        raise InputError(
            f"{folder}: was prepared without weights; name the model's own files, and this folder by {spelled('prepared')}, or make it"
            " again with `tightfit prepare --weights`"
        )
    described = described_source(prepared.request.source)
    if prepared.weights == "random":
        bits = precision(described.base, described.embeddings)
        if prepared.decoder is None:
            random = random_source(described.config, folder, precision=bits)
        else:
            random = any_random_source(described.config, folder, prepared.decoder, precision=bits)
        return replace(random, name=described.name, path=str(folder))
    header = read_header(folder / WEIGHTS)
    return Source(
        name=described.name,
        kind="prepared",
        path=str(folder),
        config=described.config,
        fingerprint=hashlib.sha256(f"{described.fingerprint} {header.fingerprint}".encode()).hexdigest(),
        has_weights=True,
        entries=described.entries,
        tensors=described.tensors,
        decoder=prepared.decoder,
        note=described.note,
        base=described.base,
        embeddings=described.embeddings,
        store=header.path,
    )
