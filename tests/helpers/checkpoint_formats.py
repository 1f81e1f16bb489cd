"""Formats of checkpoints that tests read, by what they are parametrised with; the table of docs/checkpoints.md is made
of this list.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FLOATS = ("F32", "F16", "BF16")
"""Not quantised, in safetensors and in GGUF, which call them the same."""
GGUF_GROUPS = ("Q4_0", "Q4_1", "Q8_0")
"""Kept in the groups that the store has for what it rounds itself."""
GGUF_BLOCKS = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
"""Kept as the blocks that the file has."""
GGUF_UNPACKED = ("TQ1_0", "TQ2_0")
"""Two of those that the store has no form of."""


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """Safetensors with a ``quantization_config``."""

    stated: dict[str, Any]
    """The config's entry."""
    matrices: str
    """The table's words."""
    note: str
    """What a source says of its matrices."""
    form: str
    """The store's format."""


BNB: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
EXACT = " values kept exactly"
QUANTISED: dict[str, Quantised] = {
    "nf4": Quantised(stated=BNB, matrices="NF4", note=f"NF4{EXACT}", form="nf4"),
    "nf4 double": Quantised(stated=BNB, matrices="NF4 with double quantisation", note=f"NF4{EXACT}", form="nf4"),
    "int8": Quantised(
        stated={"quant_method": "bitsandbytes", "load_in_8bit": True},
        matrices="LLM.int8",
        note=f"LLM.int8{EXACT}",
        form="int8",
    ),
    "fp4": Quantised(stated=BNB, matrices="FP4", note="FP4 unpacked to bfloat16", form="bfloat16"),
    "gptq": Quantised(stated=GPTQ, matrices="4 bits in groups of columns", note=f"GPTQ{EXACT}", form="q4_zero"),
    "gptq row": Quantised(
        stated=GPTQ | {"group_size": -1}, matrices="4 bits with a group for a row", note=f"GPTQ{EXACT}", form="q4_zero"
    ),
    "gptq v2": Quantised(
        stated=GPTQ | {"checkpoint_format": "gptq_v2"},
        matrices="4 bits of version 2",
        note=f"GPTQ{EXACT}",
        form="q4_zero",
    ),
    "gptq act-order": Quantised(
        stated=GPTQ | {"desc_act": True},
        matrices="4 bits with act-order",
        note="GPTQ with act-order unpacked to bfloat16",
        form="bfloat16",
    ),
    "awq": Quantised(stated=AWQ, matrices="4 bits in the layout `gemm`", note=f"AWQ{EXACT}", form="q4_zero"),
}


def table() -> list[str]:
    """The table of docs/checkpoints.md."""
    lines = ["| file | matrices | kept exactly |", "|---|---|---|"]
    for (file, kept), rows in itertools.groupby(_rows(), key=lambda row: (row[0], row[2])):
        lines.append(f"| {file} | {', '.join(matrices for _, matrices, _ in rows)} | {kept} |")
    return lines


def _rows() -> Iterator[tuple[str, str, str]]:
    """(file, matrices, how exactly they are kept)"""
    for file in ("safetensors, one file or shards with `model.safetensors.index.json`", "GGUF"):
        for kind in FLOATS:
            yield file, kind, "with `--base 16bit` (F32 is rounded to bfloat16)"
    for kind in GGUF_GROUPS:
        yield "GGUF", kind, "yes, in the store's own groups"
    for kind in GGUF_BLOCKS:
        yield "GGUF", kind, "yes, block for block"
    for kind in GGUF_UNPACKED:
        yield "GGUF", kind, "to bfloat16, in 16 bits, as all types that the `gguf` package unpacks"
    for one in QUANTISED.values():
        kept = "yes" if one.note.endswith(EXACT) else "to bfloat16, in 16 bits"
        yield f"safetensors with `quant_method: {one.stated['quant_method']}`", one.matrices, kept
