"""Devices elsewhere that have their models traced and planned here and train by themselves: what they say of themselves with a
request, and after a run of how it went. Nothing of it is data, a text or a path.
"""

from __future__ import annotations

import hashlib
import os
import platform
from typing import Annotated

from pydantic import Field, ValidationError

from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.schema import JOB, Digest, JobId, JobState, RequestBody, ResponseBody, example_of
from tightfit.profiles.measuring.cpu_load import our_cores
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.processor import cpu_name
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.common.units import LARGEST

HEADER = "X-Tightfit-Device"
"""the header of a request in which a device says what it is: a `RemoteDevice` as JSON"""
LONGEST_HEADER = 1024
LONGEST_TEXT = 100
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT, pattern=r"^[\x20-\x7e]+$")]
Bytes = Annotated[int, Field(ge=0, le=LARGEST)]
Seconds = Annotated[float, Field(ge=0, le=LARGEST)]
DEVICE_ID = "device-0123456789abcdef"
DeviceId = Annotated[str, Field(pattern="^device-[0-9a-f]{16}$", examples=[DEVICE_ID])]
DEVICE = {
    "name": "raspberry",
    "processor": "Cortex-A76",
    "cores": 4,
    "memory_bytes": 4 << 30,
    "budget_bytes": 256 << 20,
}
REPORT = {
    "phases": [
        {"phase": "measuring", "predicted_bytes": 251000000, "held_bytes": 243000000},
        {"phase": "training", "predicted_bytes": 268000000, "held_bytes": 266000000},
    ],
    "predicted_step_seconds": 4.1,
    "measured_step_seconds": 4.3,
}


class RemoteDevice(RequestBody):
    """A device that asks. Letters are ASCII's."""

    model_config = example_of(**DEVICE)

    name: Text
    processor: Text
    cores: int = Field(ge=1, le=1 << 12)
    memory_bytes: Bytes = Field(description="all that the machine has")
    budget_bytes: Bytes | None = Field(None, description="what a run may take of it")

    @property
    def identity(self) -> str:
        """The id of the device, which is the same with another budget."""
        fixed = self.model_dump_json(exclude={"budget_bytes"})
        return f"device-{hashlib.sha256(fixed.encode()).hexdigest()[:16]}"


class PhaseMemory(RequestBody):
    """The memory of all of a run's processes in one of its phases."""

    phase: str = Field(pattern="^[a-z][a-z ]{0,39}$", examples=["training"])
    predicted_bytes: Bytes | None = None
    held_bytes: Bytes


class RunReport(RequestBody):
    """How a run on a device went."""

    model_config = example_of(**REPORT)

    phases: list[PhaseMemory] = Field(max_length=32)
    predicted_step_seconds: Seconds | None = None
    measured_step_seconds: Seconds | None = None


class PlanForDevice(ResponseBody):
    """The plan that a device has asked for last, and where it stands."""

    job: JobId
    state: JobState
    profile: Digest
    memory: int
    policy: str
    plan: Digest | None = None
    model: str | None = None
    status: str | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None


class AskingDevice(ResponseBody):
    """A device that has asked, and what it was told and has told since."""

    model_config = example_of(
        id=DEVICE_ID,
        seen=1790000000.0,
        device=DEVICE,
        planned={"job": JOB, "state": "queued", "profile": "0" * 64, "memory": 256 << 20, "policy": "solver"},
        report=REPORT,
    )

    id: DeviceId
    seen: float = Field(description="when it asked last")
    device: RemoteDevice
    planned: PlanForDevice | None = None
    report: RunReport | None = Field(None, description="of a run of that plan, if the device has sent one")


class AskingDeviceList(ResponseBody):
    model_config = example_of(devices=[])

    devices: list[AskingDevice]
    set_aside: list[str] = Field([], description="devices that could not be read")


def this_device(budget_bytes: int | None = None) -> RemoteDevice:
    """What this machine says of itself."""
    return RemoteDevice(
        name=_text(platform.node() or "a device"),
        processor=_text(cpu_name() or "a processor"),
        cores=our_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        budget_bytes=budget_bytes,
    )


def _text(words: str) -> str:
    return "".join(letter if " " <= letter <= "~" else "?" for letter in words[:LONGEST_TEXT])


def device_of(header: str | None) -> RemoteDevice | None:
    """The device that a header's value describes; None where there is none. Raises ServiceError 422 for anything else."""
    if header is None:
        return None
    try:
        if len(header) > LONGEST_HEADER:
            raise InputError(f"{len(header)} letters; at most {LONGEST_HEADER} are read")
        return RemoteDevice.model_validate(from_json(header))
    except (ValidationError, InputError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else None
        told = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" if fault else str(error)
        message = f"no description of a device ({told}); leave the header out, or send {', '.join(RemoteDevice.model_fields)} as JSON"
        raise ServiceError(422, "invalid_request", message, f"header.{HEADER}") from error
