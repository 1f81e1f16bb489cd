"""The device that a job is for, opened: the one place of the engine that knows devices by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.cpu import Cpu
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.device.meter import Meter

DEVICES: dict[str, Callable[[int, Meter], Device]] = {"cpu": Cpu}


def open_device(header: dict[str, Any]) -> Device:
    """With the job's arena, under its cap. Raises InputError for a kind of device that nothing runs on."""
    kind = header["device"]
    if kind not in DEVICES:
        raise InputError(f"a plan for {kind!r} cannot be run here; devices that can: {', '.join(DEVICES)}")
    return DEVICES[kind](header["arena_bytes"], Meter(header["cap_bytes"], header["budget_bytes"]))
