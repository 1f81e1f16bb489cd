"""The precision of a model's frozen weights, where the file leaves a choice, and sentences about what packing does to
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from tightfit.profiles.options import Bits
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.weights.layout import ELEMENT_BYTES, Entry

FORMATS = {"4bit": "q4", "8bit": "q8", "16bit": "bfloat16"}
"""Store formats of the choices. Matrices that the file holds in float16 stay float16 under 16bit."""
CHANGES = {"q4": "about 7 %", "q8": "about 0.6 %"}
"""By how much rounding to a format changes normally distributed weights, root mean square relative to their own
(`tests/benchmarks/rounding.py` measures it on a model)."""
PUBLISHED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of floating-point types in safetensors and GGUF files -> torch's."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How many bits a matrix is stored in. What a file holds quantised keeps its codes whatever is chosen."""

    base: Bits | None = None
    """Of matrices; None: 4bit, or 16bit beside matrices that are quantised already."""
    embeddings: Bits | None = None
    """Of the embedding and the head; None: as `base`."""

    def format(self, dtype: str = "bfloat16", *, embedding: bool = False, beside_quantised: bool = False) -> str:
        """Store format of a matrix that a file holds in the dtype `file_dtype`.

        `embedding`: whether it is the embedding or the head; `beside_quantised`: whether the file holds others
        quantised.
        """
        choice = (self.embeddings if embedding else None) or self.base or ("16bit" if beside_quantised else "4bit")
        return "float16" if choice == "16bit" and dtype == "float16" else FORMATS[choice]


DEFAULT = Precision()


def precision(base: str | None, embeddings: str | None) -> Precision:
    """The precision that a user names. Raises InputError for a name that is none of `Bits`."""
    for option, value in (("base", base), ("embeddings", embeddings)):
        if value is not None and value not in get_args(Bits):
            raise InputError(f"{spelled(option)} {value!r} is not supported; supported: {', '.join(get_args(Bits))}")
    return Precision(base=base, embeddings=embeddings)  # type: ignore[arg-type]


class SourceMatrix(NamedTuple):
    """A matrix of a file, and what becomes of it."""

    entry: Entry
    file_dtype: str
    """The type in which the file holds it, under the file's own name."""
    embedding: bool
    """Whether it is the embedding or the head."""


def check_choice(path: Path, precision: Precision, matrices: Sequence[SourceMatrix]) -> None:
    """Raise InputError if no matrix of a file can be stored with `precision`: quantised weights are never rounded
    again.

    `path` is the file's or its directory's, for the error.
    """
    for option, value in vars(precision).items():
        concerned = [matrix for matrix in matrices if option == "base" or matrix.embedding]
        if value is None or not concerned or any(matrix.file_dtype in PUBLISHED for matrix in concerned):
            continue
        if not any(bits(matrix.entry) == value for matrix in concerned):
            kinds = ", ".join(dict.fromkeys(matrix.file_dtype for matrix in concerned))
            raise InputError(
                f"{path}: {spelled(option)} {value}: it holds these weights quantised ({kinds}), and rounding twice"
                " loses more than once; leave it out to keep their codes, or use the model's 16-bit weights"
            )


def rounding_note(matrices: Iterable[SourceMatrix]) -> str:
    """What packing does to the matrices' values, in words.

    For example ``4-bit, rounded from bfloat16 (which changes weights by about 7 %); embeddings bfloat16 as published``.
    """
    parts: dict[str, bool] = {}
    for matrix in matrices:
        text = _describe_matrix(matrix)
        parts[text] = parts.get(text, True) and matrix.embedding
    if all(parts.values()):
        return "; ".join(parts)
    return "; ".join(
        [*(t for t, only in parts.items() if not only), *(f"embeddings {t}" for t, only in parts.items() if only)]
    )


def bits(entry: Entry) -> str:
    """Bits of a stored element, without its group's scales, in the form of `Bits`."""
    match = re.search(r"\d+", entry.format)
    return f"{match[0]}bit" if match else ""


def _describe_matrix(matrix: SourceMatrix) -> str:
    kind = matrix.entry.format
    if matrix.file_dtype not in PUBLISHED:
        return f"{matrix.file_dtype} " + (f"unpacked to {kind}" if kind in ELEMENT_BYTES else "values kept exactly")
    if kind == PUBLISHED[matrix.file_dtype]:
        return f"{kind} as published"
    change = f" (which changes weights by {CHANGES[kind]})" if kind in CHANGES else ""
    return f"{bits(matrix.entry).replace('bit', '-bit')}, rounded from {PUBLISHED[matrix.file_dtype]}{change}"
