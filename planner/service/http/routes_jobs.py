"""``/v1/jobs`` and what tells about the service itself."""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request
from starlette.responses import StreamingResponse

from tightfit.planner.service.http.routes_common import After, Limit, Search, errors, service_of
from tightfit.planner.service.jobs.orders import LOCAL
from tightfit.planner.service.jobs.tables import SCHEMA
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.requests import NameRequest
from tightfit.planner.service.wire.schema import (
    FINISHED,
    DeviceAnswer,
    DeviceList,
    Health,
    JobId,
    JobKind,
    JobList,
    JobState,
    ServiceJob,
)
from tightfit.profiles.devices.data_sheets import known_devices
from tightfit.profiles.measuring.cpu_load import our_cores
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.supervision.spare_memory import spare_memory

router = APIRouter()
Identity = Annotated[JobId, Path()]
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", description="`id` of the last event that was received of a stream that broke off"),
]
EVENTS = {
    200: {
        "description": (
            "`event: job` with the job, at first and at each change of its state; `event: progress` between; each with"
            " an `id`"
        ),
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": (
                    'event: progress\nid: 5e1f00d5-17\ndata: {"stage": "pricing", "incumbent": 2.65, "bound": 2.64,'
                    ' "gap": 0.004, "seconds": 3.1}\n\n'
                ),
            }
        },
    },
    **errors(404),
}


@router.get("/v1/jobs", response_model=JobList, tags=["jobs"], summary="Jobs, newest first")
async def list_jobs(
    request: Request,
    kind: JobKind | None = None,
    state: JobState | None = None,
    limit: Limit = 100,
    after: After = None,
    search: Search = None,
) -> JobList:
    service = service_of(request)
    page = service.store.jobs(kind=kind, state=state, search=search, after=after, limit=limit)
    jobs = [service.events.shown(job) for job in page.items]
    return JobList(jobs=jobs, next=page.next, set_aside=service.store.set_aside("job"))


@router.get("/v1/jobs/{identity}", response_model=ServiceJob, responses=errors(404), tags=["jobs"], summary="A job")
async def get_job(request: Request, identity: Identity) -> ServiceJob:
    service = service_of(request)
    return service.events.shown(service.store.job(identity))


@router.patch(
    "/v1/jobs/{identity}",
    response_model=ServiceJob,
    responses=errors(400, 404, 408, 413, 415),
    tags=["jobs"],
    summary="Call a job by a name",
)
async def name_job(request: Request, identity: Identity, body: NameRequest) -> ServiceJob:
    service = service_of(request)
    job = service.store.name_job(identity, body.model_dump(exclude_unset=True))
    service.events.changed(job)
    return service.events.shown(job)


@router.delete(
    "/v1/jobs/{identity}", status_code=204, responses=errors(404, 409), tags=["jobs"], summary="Delete a job"
)
async def delete_job(request: Request, identity: Identity) -> None:
    """Of a run also metrics, report, adapter and checkpoints; plans and profiles that a job has made stay. 409 while it
    has not ended.
    """
    service_of(request).supervisor.delete_job(identity)


@router.get(
    "/v1/jobs/{identity}/events",
    responses=EVENTS,
    response_class=StreamingResponse,
    tags=["jobs"],
    summary="What happens to a job, as server-sent events",
)
async def get_events(request: Request, identity: Identity, last_event_id: LastEventId = None) -> StreamingResponse:
    """Ends with the job. Begins after the event that `Last-Event-ID` names, where the service still knows what came
    then.
    """
    service = service_of(request)
    service.store.job(identity)
    return StreamingResponse(
        service.events.stream(identity, service.store.job, last_event_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )


@router.post(
    "/v1/jobs/{identity}/cancel",
    response_model=ServiceJob,
    responses=errors(404, 409),
    tags=["jobs"],
    summary="End a job",
)
async def cancel_job(request: Request, identity: Identity) -> ServiceJob:
    """A run ends with a checkpoint. 409 where the job has ended already."""
    service = service_of(request)
    job = service.store.job(identity)
    if job.state in FINISHED:
        raise ServiceError(409, "conflict", f"the job {identity} is {job.state} already")
    return service.supervisor.cancel(identity)


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
