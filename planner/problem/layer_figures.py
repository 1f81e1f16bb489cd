"""What the step knows of a layer under a decision: the bytes that it holds and the seconds that it takes, and nothing else.

One record for the three who need it: columns have numbers in it (bytes and seconds), a layer's program expressions, and the master
problem variables (both KiB and ms, by `SCALE`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

KIB = 1024.0
MS = 1e3
"""programs count in KiB and ms, whose numbers are of the same size"""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LayerFigures(Generic[T]):
    forward_peak: T
    backward_peak: T
    evaluate_peak: T
    """held at most in each window by what the layer decides on"""
    between: T
    """held from the end of the forward window to the start of the backward window"""
    outside: T
    """held from the end of the backward window to the next step's forward window"""
    forward_seconds: T
    backward_seconds: T
    """of the cores, what transfers cost them left aside: operators, recomputation, unpacking, updates"""
    arriving_forward: T
    arriving_backward: T
    """of the cores, for reads and fetches of what each window needs: paid before that window ends, in whichever it is"""
    leaving: T
    """of the cores, for what is spilled: paid before the step ends"""
    reads_forward: T
    reads_backward: T
    spills_forward: T
    fetches_backward: T
    states_fetched: T
    states_spilled: T
    """of the disk: weights read in either window, activations spilled and fetched, optimizer states moved"""
    instructions: T
    """of both schedules, counted"""

    @classmethod
    def made(cls, make: Callable[[str], T]) -> LayerFigures[T]:
        """Each figure made of its name."""
        return LayerFigures(**{name: make(name) for name in FIELDS})

    def values(self) -> list[T]:
        """In the order of `FIELDS`."""
        return [getattr(self, name) for name in FIELDS]


FIELDS = tuple(field.name for field in fields(LayerFigures))
BYTES = ("forward_peak", "backward_peak", "evaluate_peak", "between", "outside")
DISK = ("reads_forward", "reads_backward", "spills_forward", "fetches_backward", "states_fetched", "states_spilled")
SCALE = tuple(1 / KIB if name in BYTES else 1.0 if name == "instructions" else MS for name in FIELDS)
"""bytes and seconds to what programs count in"""
