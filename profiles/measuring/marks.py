"""What is to be known of a device's figures before anything is made of them: a line at the top of a profile and of its plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightfit.profiles.measuring.cpu_load import crowded

if TYPE_CHECKING:
    from tightfit.profiles.schema import Device


def marks(device: Device) -> list[str]:
    """Why its figures are not those of the device alone, one reason each; nothing where there is none."""
    said = []
    if crowded(device.busy_cores, device.threads):
        said.append(
            f"other programs took {device.busy_cores:.1f} cores while this was measured, so times are too long;"
            " profile again once they are idle"
        )
    said += [channel.doubt for channel in (device.read, device.write) if channel.doubt is not None]
    return said


def caution(device: Device) -> list[str]:
    """All of them in one line; none where there are none."""
    said = marks(device)
    return [f"caution: {'; '.join(said)}"] if said else []
