"""Opens the device that a job names: the one place of the engine that knows devices by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.cpu import Cpu
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.device.meter import Meter

DEVICES: dict[str, Callable[[int, Meter], Device]] = {"cpu": Cpu}


def open_device(header: dict[str, Any]) -> Device:
    """Open the device with the job's arena and cap. Raises InputError for a kind of device that has no back end."""
    kind = header["device"]
    if kind not in DEVICES:
        raise InputError(f"a plan for {kind!r} cannot be run here; devices that can: {', '.join(DEVICES)}")
    return DEVICES[kind](header["arena_bytes"], Meter(header["cap_bytes"], header["budget_bytes"]))
