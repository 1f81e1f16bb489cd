"""A bundle: a folder with all that a small device needs to train a model, and to ask it, without tracing it.

    bundle.json        what was traced, and the model and options that it was traced for (`Bundle`), with a checksum
    weights.store      the packed weights, where they were asked for, and the vocabulary beside them
    vocabulary.json,   (`tightfit.profiles.sources.directory_tokenizer.write_vocabulary`)
    tokenizer.json

`tightfit prepare` writes it on a machine that can trace the model; a service makes the same one, without weights, of a
`BundleRequest`. Where it has no weights, the device names the model's own files and packs them itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError

from tightfit.profiles.models.answer_steps import Answers
from tightfit.profiles.models.decoder_facts import DecoderFacts
from tightfit.profiles.schema import PROFILE_VERSION, FrozenRecord, TracedStep
from tightfit.profiles.sources.vocabulary import TOKENIZER, WORDS, Vocabulary
from tightfit.profiles.weights.source import BUNDLE, Source
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import of_another_version, read_whole, write_whole
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import JsonError, from_json
from tightfit.runtime.engine.weights.layout import read_header

STORE = "weights.store"
BEGIN, END = ', "bundle": ', "}\n"
"""what stands around the text of which there is a checksum"""
AGAIN = "make the bundle again with `tightfit prepare`, or copy the folder again"
MOST_STORED = 1 << 18
"""names of tensors in a checkpoint: a quantised matrix has several, and each may have two spellings"""
LONGEST_NAME = 512
"""letters of the names of models and tensors"""
PLACES = ("adapter_base", "_name_or_path")
"""fields of a config that may name a folder of the machine that has the model"""
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]


class BundleRequest(FrozenRecord):
    """A language model as its headers describe it, and the step of training that is wanted: all of a model that leaves
    a device which has it traced elsewhere.
    """

    name: Name
    config: dict[str, Any]
    stored: Annotated[list[Name], Field(max_length=MOST_STORED)] = Field(
        [], description="names of the tensors in the checkpoint, of a decoder that transformers builds"
    )
    options: dict[str, Any] = Field(
        {}, description="fields of `tightfit.profiles.options.ProfileOptions` that say what is traced"
    )
    lora: dict[str, Any] | None = Field(
        None,
        description="the settings of an adapter that lies on the device (`tightfit.profiles.models.lora.LoraConfig`)",
    )

    def without_places(self) -> Self:
        """The request without what may name a folder of the device: as it leaves it, and the same on every device."""
        return self.model_copy(update={"config": _without_places(self.config)})


class PackedWeights(FrozenRecord):
    """How the weights in a bundle were packed (the fields of `tightfit.profiles.weights.source.Source`)."""

    base: str | None
    embeddings: str | None
    note: str


class Bundle(FrozenRecord):
    """What was traced, and what it was traced for."""

    version: int = PROFILE_VERSION
    request: BundleRequest
    step: TracedStep
    answers: Answers
    decoder: DecoderFacts | None = None
    """what a decoder that transformers builds consists of"""
    weights: PackedWeights | None = None
    """None: the device names the model's own files"""

    def json(self) -> str:  # type: ignore[override]
        """The content of `BUNDLE`."""
        text = self.model_dump_json()
        return json.dumps({"checksum": hashlib.sha256(text.encode()).hexdigest()})[:-1] + f"{BEGIN}{text}{END}"

    @classmethod
    def parse(cls, content: bytes, name: str) -> Self:
        """Raises InputError for what is no such file, damaged, or of another version; `name` is what messages call
        it.
        """
        try:
            data = from_json(content)
        except JsonError as error:
            raise InputError(f"{name}: not JSON, perhaps cut off ({error}); {AGAIN}") from error
        if not isinstance(data, dict) or not isinstance(data.get("bundle"), dict):
            raise InputError(f"{name}: no bundle; {AGAIN}")
        version = data["bundle"].get("version")
        if version != PROFILE_VERSION:
            raise InputError(f"{name}: {of_another_version('bundle', version, PROFILE_VERSION)}; {AGAIN}")
        try:
            bundle = cls.model_validate(data["bundle"])
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{name}: field {field}: {first['msg']} (got {str(first['input'])[:60]!r}); {AGAIN}"
            ) from error
        text = content.partition(BEGIN.encode())[2].removesuffix(END.encode())
        if data.get("checksum") != hashlib.sha256(text).hexdigest():
            raise InputError(f"{name}: its content does not match its checksum: changed or damaged; {AGAIN}")
        return bundle

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Raises InputError for a folder that is no bundle."""
        path = Path(folder) / BUNDLE
        try:
            content = read_whole(path)
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; make a bundle with `tightfit prepare MODEL -o {folder}`"
            ) from error
        return cls.parse(content, str(path))

    def save(self, folder: Path, store: Path | None = None, vocabulary: Vocabulary | None = None) -> None:
        """Write the bundle into a folder, with copies of the packed weights in `store` and of the vocabulary. What the
        folder held of an earlier one is replaced.

        Raises InputError for a folder that cannot be written, RunError if the disk is full.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (BUNDLE, STORE, TOKENIZER, WORDS):
                (folder / name).unlink(missing_ok=True)
            if vocabulary is not None:
                from tightfit.profiles.sources.directory_tokenizer import write_vocabulary

                write_vocabulary(folder, vocabulary)
            if store is not None:
                shutil.copyfile(store, folder / STORE)
        except OSError as error:
            error_type = RunError if store is not None else InputError
            raise error_type(
                f"{error.filename or folder}: {error.strerror}; free some space or choose another folder"
            ) from error
        write_whole(folder / BUNDLE, self.json())  # the last one: until then the folder is no bundle

    def check_config(self, name: str, config: dict[str, Any]) -> None:
        """Raise InputError if the bundle was made for a model with another configuration than that of the model
        `name`.
        """
        there, here = _without_places(self.request.config), _without_places(config)
        for field in sorted({*there, *here}):
            if there.get(field) != here.get(field):
                raise InputError(
                    f"the bundle was made for {self.request.name}, and {name} is another model: its configuration says"
                    f" {field} {there.get(field)!r} there and {here.get(field)!r} here; make a bundle of this one"
                )

    def source(self, folder: Path, *, base: str | None = None, embeddings: str | None = None) -> Source:
        """The model in the bundle, which lies in a folder. Raises InputError where its weights are elsewhere, or packed
        in another precision than is asked for.
        """
        if self.weights is None:
            raise InputError(
                f"{folder}: a bundle without weights; name the model's own files, and this folder by"
                f" {spelled('bundle')}, or make it again with `tightfit prepare --weights`"
            )
        for option, asked in (("base", base), ("embeddings", embeddings)):
            packed = getattr(self.weights, option)
            if asked not in (None, packed):
                was = f"without {spelled(option)}" if packed is None else spelled(option, packed)
                raise InputError(
                    f"{spelled(option, asked)}: {folder} was made {was}; leave the option out, or make the bundle again"
                )
        header = read_header(folder / STORE)
        config = self.request.config | (self.decoder.config if self.decoder else {})
        return Source(
            name=self.request.name,
            kind="bundle",
            path=str(folder),
            config=config,
            fingerprint=header.fingerprint,
            has_weights=True,
            entries={name: replace(entry, offset=0, segment=0) for name, entry in header.entries.items()},
            tensors=lambda: (),
            note=self.weights.note,
            base=self.weights.base,
            embeddings=self.weights.embeddings,
            store=header.path,
            decoder=self.decoder,
        )


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in PLACES}
