"""The protocol `Device`: what the engine asks of a device (an arena, copies in and out, operators, a check of the cap).

The engine's code names no device; `tightfit.runtime.engine.training.devices` opens the one that a plan is for. A back
end is a class that meets `Device`, with its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tightfit.runtime.engine.device.meter import Meter

ALIGNMENT = 64
"""bytes; every tensor's offset in the arena is a multiple of it"""


def aligned(size: int) -> int:
    """Bytes, rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Kernels:
    """The operators of a device."""

    fused: Mapping[str, Callable[..., Any]]
    """fused operators by target, called as ``fused(*args, out=[...], **kwargs)``; unused outputs are None"""
    direct: Mapping[str, Callable[..., Any]]
    """those of PyTorch's operators by target that have a better form here than the one that PyTorch's out variants
    give, called in the same way; not used for operators that a profile marks as `copied`
    """
    dispatch_key: str
    """PyTorch's dispatch key of its own kernels for the device"""


class Mark(Protocol):
    """A point in the queue of a device's work, which the device reaches later."""

    def wait(self) -> None:
        """Block until the device has reached this mark."""
        ...


class ReachedMark:
    """The mark of a device whose calls return only once their work is done."""

    def wait(self) -> None:
        """Return at once: the mark was reached before it was made."""


class Device(Protocol):
    """One arena on one device. Offsets and sizes are bytes; a tensor at an offset lies in the arena and is no copy. Its
    storage begins and ends with it, as that of a tensor outside of an arena.

    A device may work later than it is asked. Its operators run in the order in which they were asked for; a copy runs
    beside them, as soon as the mark that it is given is reached. Marks are the only order between the two.
    """

    size: int
    """bytes of the arena"""
    kernels: Kernels
    meter: Meter

    def window(self, dtype: str) -> Callable[[int, int], Tensor]:
        """The function that makes a flat tensor of `dtype` of the arena, from an offset and a number of elements."""
        ...

    def tensor(self, offset: int, shape: Iterable[int], dtype: str) -> Tensor:
        """A contiguous tensor of the arena, on the device."""
        ...

    def raw(self, offset: int, size: int) -> Tensor:
        """`size` bytes of the arena, uint8, on the device."""
        ...

    def host(self, offset: int, shape: Iterable[int], dtype: str) -> Tensor:
        """A contiguous tensor in host memory that stands for the arena's bytes from `offset` on: source of `put`,
        target of `get`.

        Its contents are undefined until they are written. If the arena is in host memory, it is a view of the arena, so
        that nothing is copied. It stays valid as long as the device.
        """
        ...

    def mark(self) -> Mark:
        """The end of all operators that were asked for so far."""
        ...

    def follow(self, mark: Mark) -> None:
        """Have operators that are asked for from now on begin once `mark` is reached."""
        ...

    def put(self, offset: int, host: Tensor, after: Mark) -> Mark:
        """Copy the contiguous tensor `host`, which must not change meanwhile, to `offset` of the arena once `after` is
        reached; returns the mark of its end. May be called in another thread than the one that asks for operators.
        """
        ...

    def get(self, offset: int, host: Tensor, after: Mark) -> Mark:
        """Copy bytes of the arena from `offset` on into the contiguous tensor `host`, otherwise as `put`."""
        ...

    def release(self) -> None:
        """Give the arena's memory back; its contents are zero afterwards."""
        ...


def put_now(device: Device, offset: int, host: Tensor) -> None:
    """Copy `host` to `offset` of the arena, after all operators that were asked for; finished when it returns."""
    device.put(offset, host, device.mark()).wait()


def get_now(device: Device, offset: int, host: Tensor) -> Tensor:
    """Copy bytes of the arena from `offset` on into `host`, as `put_now`; returns it."""
    device.get(offset, host, device.mark()).wait()
    return host
