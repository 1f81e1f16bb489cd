"""What tells about the service and its machine: devices, files under the roots, published models."""

from __future__ import annotations

import asyncio
import os
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request

from tightfit.planner.service.http.described import service_of
from tightfit.planner.service.http.root_files import files_under, parameters
from tightfit.planner.service.jobs.orders import LOCAL
from tightfit.planner.service.jobs.tables import SCHEMA
from tightfit.planner.service.wire.inputs import FilesAnswer, FilesKind, Gallery, Shape
from tightfit.planner.service.wire.schema import DeviceAnswer, DeviceList, Health
from tightfit.profiles.devices.data_sheets import known_devices
from tightfit.profiles.measuring.cpu_load import our_cores
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.supervision.spare_memory import spare_memory

router = APIRouter()


@router.get(
    "/v1/files", response_model=FilesAnswer, tags=["inputs"], summary="Models and data under the roots, newest first"
)
async def list_files(request: Request, kind: FilesKind) -> FilesAnswer:
    """Of models, headers are read and no weights. What a request could not name is left out."""
    return await asyncio.to_thread(files_under, service_of(request).settings.roots, kind)


@router.get(
    "/v1/gallery",
    response_model=Gallery,
    tags=["inputs"],
    summary="Sizes of published models, to plan for without their weights",
)
async def get_gallery() -> Gallery:
    return _gallery()


@cache
def _gallery() -> Gallery:
    """The configurations of `gallery.json`, by number of parameters."""
    configs = from_json((files("tightfit.planner.service.wire") / "gallery.json").read_bytes())
    shapes = [
        Shape(
            name=name,
            family=config["model_type"],
            parameters=parameters(config),
            layers=config["num_hidden_layers"],
            config=config,
        )
        for name, config in configs.items()
    ]
    return Gallery(shapes=sorted(shapes, key=lambda shape: shape.parameters))


@router.get("/v1/devices", response_model=DeviceList, tags=["service"], summary="Devices")
async def list_devices() -> DeviceList:
    """This machine, to which runs go; then those that can be planned for."""
    spare_bytes, spare_why = _spare()
    own_device = DeviceAnswer(
        name=LOCAL,
        label="the service's machine",
        kind="cpu",
        threads=our_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        local=True,
        spare_bytes=spare_bytes,
        spare_why=spare_why,
    )
    others = [
        DeviceAnswer(
            **device.model_dump(include={"name", "label", "kind", "threads", "memory_bytes"}),
            local=False,
        )
        for device in known_devices()
    ]
    return DeviceList(devices=[own_device, *others])


def _spare() -> tuple[int | None, str]:
    """Bytes that a run may take here now, as `--memory auto` finds them, and in words where they come from; none, and
    why.
    """
    try:
        return spare_memory()
    except InputError as error:
        return None, str(error)


@router.get("/healthz", response_model=Health, tags=["service"], summary="Whether the service answers")
async def health(request: Request) -> Health:
    """Needs no token."""
    store = service_of(request).store
    store.lane(LOCAL)
    return Health(
        status="ok",
        version=request.app.version,
        profile_version=PROFILE_VERSION,
        schema_version=SCHEMA,
        set_aside=store.set_aside(),
    )
