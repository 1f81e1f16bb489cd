"""Warnings about a device's measured figures, shown in one line above a profile and above the plans made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightfit.profiles.measuring.cpu_load import crowded
from tightfit.runtime.common.torch_interface import untried

if TYPE_CHECKING:
    from tightfit.profiles.schema import DeviceFigures


def marks(device: DeviceFigures) -> list[str]:
    """Reasons to doubt the figures, in words: other programs kept the cores busy, a bandwidth could not be measured,
    PyTorch is newer than this code.
    """
    doubts = []
    if crowded(device.busy_cores, device.threads):
        doubts.append(
            f"other programs took {device.busy_cores:.1f} cores while this was measured, so times are too long;"
            " profile again once they are idle"
        )
    if device.torch_version and (words := untried(device.torch_version)):
        doubts.append(words)
    doubts += [channel.doubt for channel in (device.read, device.write) if channel.doubt is not None]
    return doubts


def caution(device: DeviceFigures) -> list[str]:
    """All `marks` of the device as a list of one line; an empty list if there are none."""
    doubts = marks(device)
    return [f"caution: {'; '.join(doubts)}"] if doubts else []
