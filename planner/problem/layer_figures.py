"""The figures (bytes, seconds, instructions) through which a layer under a decision enters the model of the step, and
nothing else.

The record has three uses, which differ in the type of a figure: numbers in a column (bytes and seconds), linear
expressions in the MILP of a layer, and variables in the master problem (both in KiB and ms, see `SCALE`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

KIB = 1024.0
MS = 1e3
"""linear and integer programs count in KiB and ms, so that their numbers are of similar magnitude"""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LayerFigures(Generic[T]):
    """The figures of one layer; docs/formulation.md has their symbols."""

    forward_peak: T
    backward_peak: T
    evaluate_peak: T
    """most bytes that the layer holds in each window, of tensors that its decision covers or that the window touches"""
    between: T
    """bytes held from the end of the forward window to the start of the backward window"""
    outside: T
    """bytes held from the end of the backward window to the next step's forward window"""
    forward_seconds: T
    backward_seconds: T
    """seconds of computation without the cores' part of transfers: operators, recomputation, unpacking, updates"""
    arriving_forward: T
    arriving_backward: T
    """seconds of the cores for reads and fetches of what each window needs; spent in that window or an earlier one"""
    leaving: T
    """seconds of the cores for spills; spent any time before the step ends"""
    reads_forward: T
    reads_backward: T
    spills_forward: T
    fetches_backward: T
    states_fetched: T
    states_spilled: T
    """seconds of the disk: for weights read in either window, activations spilled and fetched,
    optimizer states moved
    """
    instructions: T
    """number of instructions in the schedules of training and evaluation"""

    @classmethod
    def of(cls, make: Callable[[str], T]) -> LayerFigures[T]:
        """A record whose figures are `make(name)`."""
        return LayerFigures(**{name: make(name) for name in FIELDS})

    def values(self) -> list[T]:
        """The figures in the order of `FIELDS`."""
        return [getattr(self, name) for name in FIELDS]


FIELDS = tuple(field.name for field in fields(LayerFigures))
BYTES = ("forward_peak", "backward_peak", "evaluate_peak", "between", "outside")
DISK = ("reads_forward", "reads_backward", "spills_forward", "fetches_backward", "states_fetched", "states_spilled")
SCALE = tuple(1 / KIB if name in BYTES else 1.0 if name == "instructions" else MS for name in FIELDS)
"""factors from bytes and seconds to KiB and ms, in the order of `FIELDS`"""
