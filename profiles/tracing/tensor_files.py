"""Files with tensors by name, between two processes of one profile; one of them has PyTorch without PyTorch's Python,
and so without `torch.load`.

A line of JSON, {name: [dtype, shape, stride]}, then the elements of each tensor as they lie in memory.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tightfit.runtime.common.strict_json import from_json

EVALUATION = "evaluation"
"""name of the loss of an evaluation among the results of a step"""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    flat = {name: _elements(tensor.detach()) for name, tensor in tensors.items()}
    header = {
        name: [str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride())] for name, t in tensors.items()
    }
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        for elements in flat.values():
            if elements.numel():
                size = elements.numel() * elements.element_size()
                file.write((ctypes.c_char * size).from_address(elements.data_ptr()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    tensors = {}
    with path.open("rb") as file:
        for name, (kind, shape, stride) in from_json(file.readline()).items():
            elements = torch.empty(_span(shape, stride), dtype=getattr(torch, kind))
            if elements.numel():
                size = elements.numel() * elements.element_size()
                file.readinto((ctypes.c_char * size).from_address(elements.data_ptr()))
            tensors[name] = elements.as_strided(shape, stride)
    return tensors


def _elements(tensor: Tensor) -> Tensor:
    """The elements from a tensor's first to its last, as they lie in memory."""
    return tensor.as_strided((_span(tensor.shape, tensor.stride()),), (1,), tensor.storage_offset())


def _span(shape: tuple[int, ...] | list[int], stride: tuple[int, ...] | list[int]) -> int:
    return 0 if 0 in shape else 1 + sum((length - 1) * step for length, step in zip(shape, stride))
