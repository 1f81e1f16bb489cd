"""What the engine asks of a device: memory for a plan's arena, copies in and out, operators, and whether the cap is kept.

The engine names no device. `tightfit.runtime.engine.training.devices` opens the one that a plan is for; a back end is a class that
meets `Device`, and its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tightfit.runtime.engine.device.meter import Meter

ALIGNMENT = 64
"""bytes: of every tensor's offset in the arena"""


@dataclass(frozen=True)
class Kernels:
    """The operators of a device."""

    fused: Mapping[str, Callable[..., Any]]
    """by target: called as ``fused(*args, out=[...], **kwargs)``; outputs that are not used are None"""
    dispatch_key: str
    """under which PyTorch keeps its own kernels for the device"""


class Device(Protocol):
    """One arena on one device. Offsets and sizes are bytes; a tensor at an offset is a view of the arena, not a copy."""

    size: int
    """bytes of the arena"""
    kernels: Kernels
    meter: Meter

    def window(self, dtype: str) -> tuple[Callable[..., Tensor], int]:
        """`as_strided(size, stride, elements)` of the whole arena as `dtype`, and log2 of the element's bytes."""
        ...

    def tensor(self, at: int, shape: Iterable[int], dtype: str) -> Tensor:
        """A contiguous tensor of the arena, on the device."""
        ...

    def raw(self, at: int, size: int) -> Tensor:
        """`size` bytes of the arena, uint8, on the device."""
        ...

    def host(self, at: int, shape: Iterable[int], dtype: str) -> Tensor:
        """A contiguous tensor in host memory in which these bytes of the arena are prepared for `put`, or taken by `get`.

        What it holds before is undefined. A device whose arena is host memory gives the arena's own bytes, so that nothing is
        copied; it stays valid as long as the device.
        """
        ...

    def put(self, at: int, host: Tensor) -> None:
        """Bytes of the arena from `at` on become those of a contiguous tensor in host memory; done when it returns."""
        ...

    def get(self, at: int, host: Tensor) -> None:
        """A contiguous tensor in host memory gets bytes of the arena from `at` on; done when it returns."""
        ...

    def fence(self) -> None:
        """Wait for every operator that was started: a transfer in another thread follows, which must not overtake them."""
        ...

    def release(self) -> None:
        """Give the arena's pages back; what was there is zero again."""
        ...
