"""Defines `Source`, an opened model before it is packed: its tensors with their packed formats, and their rows on
demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.models.decoder_config import text_config
from tightfit.profiles.models.decoder_facts import DecoderFacts
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import JsonError, read_json
from tightfit.runtime.engine.weights.layout import Entry

if TYPE_CHECKING:
    from torch import Tensor


BLOCK_BYTES = 8 << 20
"""Size in float32 of the rows that are packed at a time."""


def config_name(path: Path) -> str:
    """What a model is called of which there is a configuration alone."""
    return path.parent.name if path.name == "config.json" and path.parent.name else path.stem


def block_rows(entry: Entry) -> int:
    """How many rows of a tensor are packed at a time."""
    return min(entry.rows, max(1, BLOCK_BYTES // (4 * entry.columns)))


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a file of the source has a tensor, and how."""

    key: str
    """What the file calls it; of a quantised matrix in safetensors, what it would be called if it were not
    quantised.
    """
    dtype: str
    """The type in which the file holds it, under the file's own name."""
    parts: frozenset[str] = frozenset()
    """Names in the files of the tensors that a quantised matrix is made of."""
    transposed: bool = False
    """Whether the file has rows and columns the other way round."""


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """A tensor whose rows are read on demand."""

    entry: Entry
    rows: Callable[[int, int], Tensor]
    """rows(start, stop) returns floats [stop - start, ...], or uint8 [stop - start, row bytes] if already packed."""
    origin: str = ""
    """In words, for errors: the file that holds it, and what it is called there."""
    origins: Sequence[str] = ()
    """The same of each of several tensors of equal height whose rows, one below the other, are its rows."""
    parts: Sequence[str] = ()
    """What files call these."""
    stored: StoredTensor | None = None
    """None: no file holds it as it is."""

    def origin_of(self, row: int) -> str:
        """In words, for errors, where a row comes from."""
        if self.origins:
            return self.origins[row * len(self.origins) // self.entry.rows]
        return self.origin or f"tensor {self.entry.name!r}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model before it is packed, of which only headers have been read."""

    name: str
    kind: str
    """One of huggingface, gguf, random, module and bundle."""
    path: str
    """What the user named, made absolute where it is a path."""
    config: dict[str, Any]
    """Hugging Face style, with model_type; for a module: {"factory": "package.module:factory",
    "state_dict": {key of its state_dict: name of the stored tensor}}."""
    fingerprint: str
    """sha256 that changes when the weights may have changed, or how they are packed."""
    has_weights: bool
    entries: dict[str, Entry]
    """Every tensor with its packed format; offsets are 0."""
    tensors: Callable[[], Iterable[SourceTensor]]
    """The same tensors in the same order, with their data."""
    note: str = ""
    """In words: what packing does to the weights' values."""
    base: str | None = None
    embeddings: str | None = None
    """The precision that was asked for (`tightfit.profiles.weights.precision`)."""
    store: Path | None = None
    """Where its weights lie, packed already; None: they are packed when they are first needed."""
    decoder: DecoderFacts | None = None
    """What its decoder consists of, where transformers builds that."""
    needs_numpy: bool = False
    """Whether reading its rows takes NumPy beside PyTorch."""


def without_names(config: dict[str, Any]) -> dict[str, Any]:
    """The config without fields that do not affect the store: those that name an adapter's tensors and base model."""
    return {key: value for key, value in config.items() if key not in ("adapter_body", "adapter_base", "wrapper_type")}


BUNDLE = "bundle.json"
"""the file by which a bundle is known (`tightfit.profiles.sources.bundle`)"""
FORMS = "a Hugging Face directory or hub id, a GGUF file, a config.json, or package.module:factory"


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json; a multimodal wrapper gives the text model's config."""
    try:
        data: Any = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a model directory needs a config.json") from error
    except JsonError as error:
        raise InputError(f"{path}: not JSON ({error}); download the file again") from error
    config = text_config(data)
    if config is None:
        raise InputError(f"{path}: not a model config (no 'model_type'); a model is {FORMS}")
    return config
