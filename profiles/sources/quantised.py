"""Matrices that Hugging Face checkpoints hold quantised: bitsandbytes (NF4, int8), GPTQ and AWQ, kept code for code.

Sources of the layouts: `QuantState` and the kernels of bitsandbytes; AutoGPTQ's `qlinear_cuda_old.py` (version 1, whose
zeros are stored less 1, and version 2, `gptq_v2`); AutoAWQ's `gemm.py`. Values are what the codes mean in float32,
which is rounded once, to the type of the arithmetic, when a weight is unpacked. What the store has no form of (4-bit
GPTQ with act-order, FP4) is unpacked to bfloat16 when it is packed: the same values in a bfloat16 step, in 16 bits.

Here the matrices are found and described, without PyTorch; `tightfit.profiles.sources.quantised_rows` reads their rows.
"""

from __future__ import annotations

import array
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tightfit.profiles.weights.tensor_file import FileTensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.engine.weights.layout import NF4, Entry

NAMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4"}
QUANT_STATE = "quant_state.bitsandbytes__"


Load = Callable[[str], FileTensor]
"""A tensor by its name."""


@dataclass(frozen=True, kw_only=True)
class FourBitLayout:
    """bitsandbytes' 4 bits, in blocks that run on over the rows."""

    block: int
    """Elements that share a scale in the file."""
    nested: bool
    """Whether the scales are codes of 8 bits (QLoRA's double quantisation)."""
    nested_block: int
    """Scales that share a scale of their own."""
    mean: float
    """What is added to nested scales."""


@dataclass(frozen=True, kw_only=True)
class Int8Layout:
    """LLM.int8 of bitsandbytes: a scale for each row."""

    scales: str
    """Name of the scales' tensor."""


@dataclass(frozen=True, kw_only=True)
class ZeroPointLayout:
    """GPTQ and AWQ: scales and zeros for the groups of each row."""

    method: str
    parts: Mapping[str, str]
    """Names of the tensors qweight, qzeros and scales, and of g_idx where groups are in the order of activations."""
    group: int
    offset: int
    """What is added to stored zeros."""


@dataclass(frozen=True, kw_only=True)
class QuantisedMatrix:
    """A matrix of a checkpoint that lies there in codes."""

    method: str
    """What it is quantised with, in words."""
    entry: Entry
    layout: FourBitLayout | Int8Layout | ZeroPointLayout
    parts: frozenset[str]
    """Names of the tensors that it is made of."""

    @property
    def packable(self) -> bool:
        """Whether the store has a form of its codes; else it is unpacked."""
        return self.entry.group > 0


def method_of(path: Path, config: Mapping[str, Any]) -> str | None:
    """The quantisation that a config states; None: none. Raises InputError for one that cannot be read."""
    stated = config.get("quantization_config")
    if not stated:
        return None
    method = stated.get("quant_method", "bitsandbytes" if "load_in_4bit" in stated else "unknown")
    bits = stated.get("bits", 4)
    problem = None
    if method not in NAMES:
        problem = f"quantised with {method}, which cannot be read; readable: {', '.join(NAMES.values())}"
    elif method != "bitsandbytes" and bits != 4:
        problem = f"{NAMES[method]} with {bits} bits, which cannot be read; readable: 4 bits"
    elif method == "awq" and stated.get("version", "gemm") != "gemm":
        problem = f"AWQ in the layout {stated['version']!r}, which cannot be read; readable: 'gemm'"
    if problem:
        raise InputError(f"{path}: weights {problem}; use the model's 16-bit weights or a GGUF file")
    return str(method)


def find(
    stated: Mapping[str, Any], names: Container[str], load: Load, name: str, shape: tuple[int, ...]
) -> QuantisedMatrix | None:
    """The matrix `name` of `shape` among a file's tensor `names`; None if it is not quantised.

    `stated` is the config's quantization_config. Raises InputError for parts that do not fit together.
    """
    stem = name.removesuffix(".weight")
    matrix = None
    if f"{stem}.qweight" in names:
        matrix = _zero_points(stated, names, load, name, stem, shape)
    elif f"{stem}.SCB" in names:
        matrix = _int8(names, load, name, stem, shape)
    else:
        for kind in ("nf4", "fp4"):
            if f"{name}.{QUANT_STATE}{kind}" in names:
                matrix = _four_bit(names, load, name, kind, shape)
    # AutoGPTQ writes a bias of zeros for matrices that have none.
    if matrix is not None and (bias := f"{stem}.bias") in names and not any(load(bias).numbers()):
        matrix = replace(matrix, parts=matrix.parts | {bias})
    return matrix


def _check(name: str, property_name: str, actual: Any, expected: Any) -> None:
    if actual != expected:
        raise InputError(
            f"tensor {name!r}: its {property_name} is {actual} where {expected} is due; the checkpoint is damaged, or"
            " of a form that is not supported"
        )


# bitsandbytes


def _four_bit(names: Container[str], load: Load, name: str, kind: str, shape: tuple[int, ...]) -> QuantisedMatrix:
    state_name = f"{name}.{QUANT_STATE}{kind}"
    try:
        state = from_json(load(state_name).content())
        block, nested = int(state["blocksize"]), f"{name}.nested_absmax" in names
        nested_block, mean = (int(state["nested_blocksize"]), float(state["nested_offset"])) if nested else (0, 0.0)
        stored_shape = tuple(state["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"tensor {state_name!r} is damaged ({error!r}); download the model again") from error
    _check(name, "shape", stored_shape, shape)
    columns = math.prod(shape[1:])
    # A block of bitsandbytes may end inside a row: its scale is then repeated for its parts.
    group = math.gcd(columns, block)
    _check(name, "number of bytes", math.prod(load(name).shape), shape[0] * columns // 2)
    suffixes = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f".{QUANT_STATE}{kind}")
    table = array.array("f", load(f"{name}.quant_map").numbers())  # rounded to float32, as PyTorch does
    packable = group % 2 == 0 and table == array.array("f", NF4)
    return QuantisedMatrix(
        method=kind.upper(),
        entry=Entry(name=name, shape=shape, format="nf4" if packable else "bfloat16", group=group if packable else 0),
        layout=FourBitLayout(block=block, nested=nested, nested_block=nested_block, mean=mean),
        parts=frozenset(f"{name}{suffix}" for suffix in suffixes if f"{name}{suffix}" in names),
    )


def _int8(names: Container[str], load: Load, name: str, stem: str, shape: tuple[int, ...]) -> QuantisedMatrix:
    columns = math.prod(shape[1:])
    _check(name, "shape", load(name).shape, shape)
    _check(name, "number of scales (SCB)", math.prod(load(f"{stem}.SCB").shape), shape[0])
    parts = {name, f"{stem}.SCB"}
    if f"{stem}.weight_format" in names:
        parts.add(f"{stem}.weight_format")
        _check(name, "weight_format", [int(number) for number in load(f"{stem}.weight_format").numbers()], [0])
    return QuantisedMatrix(
        method="LLM.int8",
        entry=Entry(name=name, shape=shape, format="int8", group=columns),
        layout=Int8Layout(scales=f"{stem}.SCB"),
        parts=frozenset(parts),
    )


# GPTQ and AWQ


def _zero_points(
    stated: Mapping[str, Any], names: Container[str], load: Load, name: str, stem: str, shape: tuple[int, ...]
) -> QuantisedMatrix:
    method = stated["quant_method"]
    parts = {part: f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")}
    for key in parts.values():
        if key not in names:
            raise InputError(f"no tensor {key!r} beside {parts['qweight']!r}; download the model again")
    outputs, inputs = shape
    size = int(stated.get("group_size", 128))
    group = inputs if size == -1 else size
    groups = -(-inputs // group)
    eighths = outputs // 8
    expected_shapes = {"qzeros": (groups, eighths), "scales": (groups, outputs)}
    expected_shapes["qweight"] = (inputs // 8, outputs) if method == "gptq" else (inputs, eighths)
    for part, key in parts.items():
        _check(name, f"shape of {part}", load(key).shape, expected_shapes[part])
    offset = 1 if method == "gptq" and stated.get("checkpoint_format", "gptq") != "gptq_v2" else 0
    used, ordered = list(parts.values()), False
    if (key := f"{stem}.g_idx") in names:
        used.append(key)
        order = load(key).numbers()
        _check(name, "length of g_idx", len(order), inputs)
        ordered = order != [column // group for column in range(inputs)]
        if ordered and (min(order) < 0 or max(order) >= groups):
            raise InputError(f"tensor {key!r} names group {int(max(order))} of {groups}; download the model again")
    packable = not ordered and group % 2 == 0 and inputs % group == 0
    return QuantisedMatrix(
        method=NAMES[method] + (" with act-order" if ordered else ""),
        entry=Entry(
            name=name, shape=shape, format="q4_zero" if packable else "bfloat16", group=group if packable else 0
        ),
        layout=ZeroPointLayout(
            method=method, parts=parts | ({"g_idx": key} if ordered else {}), group=group, offset=offset
        ),
        parts=frozenset(used),
    )
