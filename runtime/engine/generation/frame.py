"""Where the values of a layer's program lie while a pass goes through the layer.

A value of a group of tokens is followed by that of the next group, so that the rows of all groups are one matrix, whose
storage is then longer than the value's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.generation.names import HELD
from tightfit.runtime.engine.generation.sizes import aligned
from tightfit.runtime.engine.kernels.compiled import CompiledOperator


@cache
def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    size: int = getattr(torch, dtype).itemsize
    return size


@dataclass(frozen=True)
class CompiledProgram:
    """A layer's operators; `own` are the offsets of what it makes for itself."""

    values: Mapping[str, Mapping[str, Any]]
    own: Mapping[str, int]
    operators: list[tuple[Mapping[str, Any], CompiledOperator | None]]
    """the compiled form is None for what the decoder carries out itself"""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A layer of a step, in a pass of these groups of tokens."""

    program: CompiledProgram
    passed: Mapping[str, int]
    """offsets of what passes between layers"""
    bindings: Mapping[str, str]
    groups: Sequence[slice]
    start: int
    """byte offset of all values in the arena"""
    held: Callable[[str], Tensor]
    """gives a tensor that stays in memory by its name"""
    view: Callable[[int, int, str, tuple[int, ...], tuple[int, ...], int], Tensor]
    """gives a tensor of the arena: offset in bytes, elements and dtype of its storage; size, stride and offset there"""

    def storage(self, name: str, group: int) -> Tensor:
        """The elements of a value, for a group."""
        value = self.program.values[name]
        return self._strided(name, group, (value["bytes"] // itemsize(value["dtype"]),), (1,), 0)

    def made(self, name: str, group: int) -> Tensor:
        """What an operator makes for a group."""
        value = self.program.values[name]
        return self._strided(name, group, value["shape"], value["stride"], 0)

    def window(self, operand: Mapping[str, Any], group: int) -> Tensor:
        """What an operator reads of a group."""
        return self._strided(operand["value"], group, operand["size"], operand["stride"], operand["offset"])

    def own_rows(self, operand: Mapping[str, Any], group: int) -> Tensor:
        """What an operator reads of a group's own tokens."""
        rows = self.groups[group]
        return self.window({**operand, "size": (rows.stop - rows.start, *operand["size"][1:])}, group)

    def made_own_rows(self, name: str, group: int) -> Tensor:
        """What an operator makes for a group's own tokens."""
        return self.own_rows(self._whole(name), group)

    def rows(self, operand: Mapping[str, Any]) -> Tensor:
        """What a matrix product reads: the rows [t, columns] of all groups."""
        size, stride, offset = (self.groups[-1].stop, operand["size"][1]), operand["stride"], operand["offset"]
        elements = offset + (size[0] - 1) * stride[0] + size[1]
        return self._strided(operand["value"], 0, size, stride, offset, elements)

    def made_rows(self, name: str) -> Tensor:
        """The rows of all groups of a matrix that an operator makes."""
        return self.rows(self._whole(name))

    def _whole(self, name: str) -> Mapping[str, Any]:
        value = self.program.values[name]
        return {"value": name, "size": value["shape"], "stride": value["stride"], "offset": 0}

    def _strided(
        self, name: str, group: int, size: Sequence[int], stride: Sequence[int], offset: int, elements: int = 0
    ) -> Tensor:
        value, bound = self.program.values[name], self.bindings.get(name)
        if bound is not None and value["kind"] in HELD:
            held = self.held(bound)
            return held if tuple(held.shape) == tuple(size) else held.as_strided(size, stride, offset)
        at = self.program.own[name] if bound is None else self.passed[bound]
        place = self.start + at * len(self.groups) + group * aligned(value["bytes"])
        count = max(value["bytes"] // itemsize(value["dtype"]), elements)
        return self.view(place, count, value["dtype"], tuple(size), tuple(stride), offset)
