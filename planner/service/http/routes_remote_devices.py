"""``/v1/remote-devices``: the devices that ask, what was planned for them, and how it went there."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request

from tightfit.planner.service.http.routes_common import errors, service_of
from tightfit.planner.service.wire.remote_devices import AskingDevice, AskingDeviceList, DeviceId, RunReport

router = APIRouter(prefix="/v1/remote-devices", tags=["service"])


@router.get("", response_model=AskingDeviceList, summary="Devices that ask, the latest first")
async def list_remote_devices(request: Request) -> AskingDeviceList:
    """Those that said what they are when they uploaded a profile, or asked for a trace or a plan: with the header X-Tightfit-Device."""
    store = service_of(request).store
    return AskingDeviceList(devices=store.remote_devices(), set_aside=store.set_aside("device"))


@router.post(
    "/{identity}/reports",
    status_code=201,
    response_model=AskingDevice,
    responses=errors(400, 404, 408, 413, 415),
    summary="How a run on a device went",
)
async def report_run(request: Request, identity: Annotated[DeviceId, Path()], body: RunReport) -> AskingDevice:
    """The latest report is kept, until the device asks for another plan."""
    return service_of(request).store.report_run(identity, body)
