"""The command ``tightfit devices``: lists the devices for which a step can be planned on another machine."""

from __future__ import annotations

from typing import Annotated

import typer

from tightfit.runtime.cli import answers
from tightfit.runtime.cli.options import Debug, Json
from tightfit.runtime.supervision.printing import answer


def devices(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show one device: every figure with its source.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the devices that can be planned for without being here; their times are estimated from FLOPs and bytes."""
    from tightfit.profiles.devices.data_sheets import find_device, known_devices

    listed = known_devices() if name is None else [find_device(name)]
    summary = {"devices": [device.model_dump(mode="json") for device in listed]}
    answer(summary, answers.devices_text(listed) if name is None else answers.device_text(listed[0]), as_json=as_json)
