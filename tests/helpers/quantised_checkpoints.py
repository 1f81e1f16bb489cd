"""Writes tiny checkpoints in the published layouts of bitsandbytes, GPTQ and AWQ, with the float32 values they mean.

Codes, scales and zeros are drawn at random; values come of the formats' definitions, element by element in numpy, and
share no code with what reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import write_directory
from torch import Tensor

Array = np.ndarray[Any, Any]
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=np.float32,
)  # fmt: skip
FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4] * 2, dtype=np.float32) * np.repeat([1, -1], 8).astype(
    np.float32
)
Made = tuple[dict[str, Tensor], Array]
"""Tensors by their suffix after ``.weight`` or ``.``, and the values [rows, columns]."""


def four_bit(shape: tuple[int, int], draw: np.random.Generator, *, table: Array = NF4, double: bool = False) -> Made:
    """bitsandbytes' 4 bits in blocks of 64 that run on over the rows; with `double` quantisation of the scales."""
    count = shape[0] * shape[1]
    codes = draw.integers(0, 16, count)
    blocks = -(-count // 64)
    kind = "nf4" if table is NF4 else "fp4"
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    scales = draw.uniform(0.05, 0.2, blocks).astype(np.float32)
    parts: dict[str, Tensor] = {}
    if double:
        outer = draw.uniform(0.1, 0.2, -(-blocks // 256)).astype(np.float32)
        levels = np.sort(draw.uniform(-1, 1, 256)).astype(np.float32)
        numbers = draw.integers(0, 256, blocks).astype(np.uint8)
        offset = np.float32(0.3)
        scales = np.array([levels[n] * outer[i // 256] + offset for i, n in enumerate(numbers)], dtype=np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        parts = {"weight.nested_absmax": torch.from_numpy(outer), "weight.nested_quant_map": torch.from_numpy(levels)}
    values = np.array([table[code] * scales[i // 64] for i, code in enumerate(codes)], dtype=np.float32)
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    parts |= {
        "weight": torch.from_numpy(packed).view(-1, 1),
        "weight.absmax": torch.from_numpy(numbers) if double else torch.from_numpy(scales),
        "weight.quant_map": torch.from_numpy(table.copy()),
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return parts, values.reshape(shape)


def int8(shape: tuple[int, int], draw: np.random.Generator) -> Made:
    """LLM.int8: one float32 scale for a row."""
    codes = draw.integers(-127, 128, shape).astype(np.int8)
    scales = draw.uniform(0.05, 0.2, shape[0]).astype(np.float32)
    parts = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(scales)}
    parts["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return parts, codes.astype(np.float32) * scales[:, None] * np.float32(7.874015718698502e-3)


def zero_points(
    shape: tuple[int, int],
    draw: np.random.Generator,
    *,
    method: str = "gptq",
    group: int = 32,
    version: int = 1,
    act_order: bool = False,
) -> Made:
    """GPTQ (version 1 or 2, with or without act-order) or AWQ."""
    rows, columns = shape
    groups = 1 if group == -1 else columns // group
    of = np.arange(columns) // (columns // groups)
    if act_order:
        draw.shuffle(of)
    first = 1 if method == "gptq" and version == 1 else 0
    codes, zeros = draw.integers(0, 16, shape), draw.integers(first, 16 + first, (rows, groups))
    scales = draw.uniform(0.002, 0.02, (rows, groups)).astype(np.float16)
    values = ((codes - zeros[:, of]).astype(np.float32) * scales[:, of].astype(np.float32)).astype(np.float32)
    order = [0, 1, 2, 3, 4, 5, 6, 7] if method == "gptq" else [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(numbers: Array) -> Tensor:
        """Eight columns in an int32."""
        made = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.uint32)
        for place, column in enumerate(order):
            made |= numbers[:, column::8].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(made.view(np.int32).copy())

    parts = {"qzeros": packed(zeros.T - first), "scales": torch.from_numpy(scales.T.copy())}
    # GPTQ packs along the inputs, AWQ along the outputs.
    parts["qweight"] = packed(codes).T.contiguous() if method == "gptq" else packed(codes.T)
    if method == "gptq":
        parts["g_idx"] = torch.from_numpy(of.astype(np.int32))
        parts["bias"] = torch.zeros(rows, dtype=torch.float16)
    return parts, values


def write_quantised(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    stated: dict[str, Any],
    make: Callable[[tuple[int, int], np.random.Generator], Made],
    *,
    quantised: str = "_proj.weight",
    **written: Any,
) -> dict[str, Tensor]:
    """A directory whose matrices with `quantised` in their names are replaced by those that `make` makes; the rest are
    float16.

    Returns the values of all its tensors, by name.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(weights.items()):
        if quantised not in name or weight.dim() != 2:
            tensors[name] = weight.half()
            values[name] = tensors[name].float()
            continue
        parts, meant = make(tuple(weight.shape), np.random.default_rng(number))  # type: ignore[arg-type]
        tensors |= {f"{name.removesuffix('weight')}{suffix}": part.contiguous() for suffix, part in parts.items()}
        values[name] = torch.from_numpy(meant)
    write_directory(path, config | {"quantization_config": stated}, tensors, **written)
    return values
