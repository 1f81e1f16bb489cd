"""Matrices that Hugging Face checkpoints hold quantised: bitsandbytes (NF4, int8), GPTQ and AWQ, kept code for code.

Sources of the layouts: `QuantState` and the kernels of bitsandbytes; AutoGPTQ's `qlinear_cuda_old.py` (version 1, whose
zeros are stored less 1, and version 2, `gptq_v2`); AutoAWQ's `gemm.py`. Values are what the codes mean in float32, which
is rounded once, to the type of the arithmetic, when a weight is unpacked. What the store has no form of (4-bit GPTQ with
act-order, FP4) is unpacked to bfloat16 when it is packed: the same values in a bfloat16 step, in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.engine.weights.layout import NF4, Entry

NAMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}
NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)
AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
"""Columns of eight that AWQ packs into the nibbles of an int32, lowest nibble first."""
COLUMN_OF_AWQ = torch.argsort(AWQ_ORDER)
QUANT_STATE = "quant_state.bitsandbytes__"


class FileSlice(Protocol):
    """A tensor in a safetensors file, of which parts are read when they are asked for."""

    def __getitem__(self, part: Any) -> Tensor: ...

    def get_shape(self) -> list[int]: ...


Load = Callable[[str], FileSlice]
"""A tensor by its name."""


@dataclass(frozen=True, kw_only=True)
class QuantisedMatrix:
    """A matrix of a checkpoint that lies there in codes."""

    method: str
    """What it is quantised with, in words."""
    entry: Entry
    rows: Callable[[int, int], Tensor]
    """As in `tightfit.profiles.weights.source.SourceTensor`."""
    parts: frozenset[str]
    """Names of the tensors that it is made of."""


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
    if matrix is not None and (bias := f"{stem}.bias") in names and not load(bias)[:].any():
        matrix = replace(matrix, parts=matrix.parts | {bias})
    return matrix


def _check(name: str, property_name: str, actual: Any, expected: Any) -> None:
    if actual != expected:
        raise InputError(
            f"tensor {name!r}: its {property_name} is {actual} where {expected} is due; the checkpoint is damaged, or of a form that is not"
            " supported"
        )


# bitsandbytes


def _four_bit(names: Container[str], load: Load, name: str, kind: str, shape: tuple[int, ...]) -> QuantisedMatrix:
    state_name = f"{name}.{QUANT_STATE}{kind}"
    try:
        state = from_json(bytes(load(state_name)[:].tolist()))
        block, double = int(state["blocksize"]), f"{name}.nested_absmax" in names
        inner, mean = (int(state["nested_blocksize"]), float(state["nested_offset"])) if double else (0, 0.0)
        stored_shape = tuple(state["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"tensor {state_name!r} is damaged ({error!r}); download the model again") from error
    _check(name, "shape", stored_shape, shape)
    columns = math.prod(shape[1:])
    # A block of bitsandbytes may end inside a row: its scale is then repeated for its parts.
    group = math.gcd(columns, block)
    _check(name, "number of bytes", math.prod(load(name).get_shape()), shape[0] * columns // 2)
    suffixes = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f".{QUANT_STATE}{kind}")
    parts = frozenset(f"{name}{suffix}" for suffix in suffixes if f"{name}{suffix}" in names)

    def scales() -> Tensor:
        """Float32 scale of every block: in the file, or nested, in codes of 8 bits (QLoRA's double quantisation)."""
        absmax = load(f"{name}.absmax")[:].view(-1)
        if double:
            codes, nested = (load(f"{name}.nested_{part}")[:].float().view(-1) for part in ("quant_map", "absmax"))
            outer_scales = nested.repeat_interleave(inner)[: len(absmax)]
            return codes[absmax.int()] * outer_scales + torch.tensor(mean)
        return absmax.float()

    table = load(f"{name}.quant_map")[:].float().view(-1)
    packable = group % 2 == 0 and torch.equal(table, torch.tensor(NF4))
    entry = Entry(name=name, shape=shape, format="nf4" if packable else "bfloat16", group=group if packable else 0)
    cache: dict[str, Tensor] = {}

    def rows(start: int, stop: int) -> Tensor:
        if not cache:
            cache["scales"] = scales()
        first, last = start * columns // 2, -(-stop * columns // 2)
        packed = load(name)[first:last].reshape(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)  # the first of two is the high nibble
        codes = codes[start * columns - 2 * first :][: (stop - start) * columns].view(-1, group)
        blocks = torch.arange(start * columns // group, stop * columns // group) * group // block
        scale = cache["scales"][blocks].view(-1, 1)
        if not packable:
            return (table[codes.int()] * scale).view(stop - start, columns)
        nibbles = codes[:, 0::2] | codes[:, 1::2] << 4
        return torch.cat([nibbles, scale.view(torch.uint8)], dim=1).view(stop - start, -1)

    return QuantisedMatrix(method=kind.upper(), entry=entry, rows=rows, parts=parts)


def _int8(names: Container[str], load: Load, name: str, stem: str, shape: tuple[int, ...]) -> QuantisedMatrix:
    columns = math.prod(shape[1:])
    _check(name, "shape", tuple(load(name).get_shape()), shape)
    _check(name, "number of scales (SCB)", math.prod(load(f"{stem}.SCB").get_shape()), shape[0])
    parts = {name, f"{stem}.SCB"}
    if f"{stem}.weight_format" in names:
        parts.add(f"{stem}.weight_format")
        _check(name, "weight_format", int(load(f"{stem}.weight_format")[...]), 0)

    def rows(start: int, stop: int) -> Tensor:
        codes = load(name)[start:stop].reshape(-1, columns).contiguous()
        scale = load(f"{stem}.SCB")[:].float().view(-1, 1)[start:stop].contiguous()
        return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=1)

    return QuantisedMatrix(
        method="LLM.int8",
        entry=Entry(name=name, shape=shape, format="int8", group=columns),
        rows=rows,
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
        _check(name, f"shape of {part}", tuple(load(key).get_shape()), expected_shapes[part])
    offset = 1 if method == "gptq" and stated.get("checkpoint_format", "gptq") != "gptq_v2" else 0
    order: Tensor | None = None
    if f"{stem}.g_idx" in names:
        parts["g_idx"] = f"{stem}.g_idx"
        order = load(parts["g_idx"])[:].view(-1).long()
        _check(name, "length of g_idx", len(order), inputs)
        if torch.equal(order, torch.arange(inputs) // group):
            order = None
        elif order.min() < 0 or order.max() >= groups:
            raise InputError(
                f"tensor {parts['g_idx']!r} names group {int(order.max())} of {groups}; download the model again"
            )
    packable = order is None and group % 2 == 0 and inputs % group == 0
    entry = Entry(name=name, shape=shape, format="q4_zero" if packable else "bfloat16", group=group if packable else 0)

    def rows(start: int, stop: int) -> Tensor:
        first, last = start // 8 * 8, -(-stop // 8) * 8
        wanted_rows = slice(start - first, stop - first)
        packed_columns = slice(first // 8, last // 8)
        zeros = _columns(load(parts["qzeros"])[:, packed_columns], method)[:, wanted_rows].T + offset
        scales = load(parts["scales"])[:, start:stop].T
        if method == "gptq":
            words = load(parts["qweight"])[:, start:stop]
            codes = (words.unsqueeze(1) >> NIBBLES.view(1, 8, 1) & 15).reshape(inputs, -1).T
        else:
            codes = _columns(load(parts["qweight"])[:, packed_columns], method)[:, wanted_rows].T
        if not packable:
            group_of_column = torch.arange(inputs) // group if order is None else order
            return (codes - zeros[:, group_of_column]).float() * scales.float()[:, group_of_column]
        half_scales = scales.half()
        if not torch.equal(half_scales.float(), scales.float()):
            raise InputError(
                f"tensor {parts['scales']!r} holds scales that are no float16 numbers; use the model's 16-bit weights"
            )
        pairs = codes.to(torch.uint8).reshape(-1, group)
        scale = half_scales.reshape(-1).contiguous().view(torch.uint8).view(-1, 2)
        zero = zeros.to(torch.uint8).reshape(-1, 1)
        return torch.cat([pairs[:, 0::2] | pairs[:, 1::2] << 4, scale, zero], dim=1).view(stop - start, -1)

    label = NAMES[method] + (" with act-order" if order is not None else "")
    return QuantisedMatrix(method=label, entry=entry, rows=rows, parts=frozenset(parts.values()))


def _columns(words: Tensor, method: str) -> Tensor:
    """Nibbles of int32 [n, m] that hold eight columns each, in the columns' order: int32 [n, 8 * m]."""
    nibbles = words.unsqueeze(2) >> NIBBLES & 15
    return (nibbles if method == "gptq" else nibbles[:, :, COLUMN_OF_AWQ]).reshape(len(words), -1)
