"""``/v1/fleets``: one training step of several devices, each within its own budget."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from tightfit.planner.service.http.routes_common import (
    JOB_RESPONSES,
    After,
    IdempotencyKey,
    Limit,
    Search,
    check_device,
    check_time,
    described_file,
    enqueue,
    errors,
    file_response,
    named,
    service_of,
    stored,
)
from tightfit.planner.service.jobs.store import listed
from tightfit.planner.service.wire.errors import invalid
from tightfit.planner.service.wire.requests import FleetRequest, NameRequest
from tightfit.planner.service.wire.schema import OWN_DEVICE, Digest, FleetList, StoredFleet
from tightfit.planner.service.wire.shown import FleetView

router = APIRouter(prefix="/v1/fleets", tags=["planning"])
Identity = Annotated[Digest, Path(description="of what the fleet's plan was made of")]
FILE = described_file(
    "The fleet's plan as `tightfit fleet plan` writes it", {"model": "SmolLM2-135M", "micro_batches": 16, "members": []}
)


@router.post("", status_code=202, responses=JOB_RESPONSES, summary="Plan a step of several devices")
async def make_fleet(request: Request, body: FleetRequest, key: IdempotencyKey = None) -> Response:
    """Every member's plan is kept, as those of `/v1/plans` are."""
    check_time(body.time_limit, service_of(request).settings)
    names = [member.name for member in body.members]
    for index, member in enumerate(body.members):
        if member.name in names[:index]:
            message = f"another member is called {member.name!r}; give each a name of its own"
            raise invalid(f"members.{index}.name", message)
        stored(request, "profile", member.profile, f"members.{index}.profile")
        check_device(member.device, [OWN_DEVICE], f"members.{index}.device")
    members = [member.both_ways() for member in body.members]
    uses = [("profile", member.profile) for member in body.members]
    return enqueue(request, "fleet", body.model_dump() | {"members": members}, key=key, uses=uses)


@router.get("", response_model=FleetList, summary="Fleets, newest first")
async def list_fleets(request: Request, limit: Limit = 100, after: After = None, search: Search = None) -> FleetList:
    store = service_of(request).store
    rows = store.files("fleet", search=search, after=after, limit=limit)
    return FleetList(fleets=[listed(row) for row in rows.items], next=rows.next, set_aside=store.set_aside("fleet"))


@router.get("/{identity}", response_model=StoredFleet, responses=errors(404), summary="A fleet's plan in figures")
async def get_fleet(request: Request, identity: Identity) -> StoredFleet:
    fleet: StoredFleet = listed(stored(request, "fleet", identity))
    return fleet


@router.patch(
    "/{identity}",
    response_model=StoredFleet,
    responses=errors(400, 404, 408, 413, 415),
    summary="Call a fleet by a name",
)
async def name_fleet(request: Request, identity: Identity, body: NameRequest) -> StoredFleet:
    fleet: StoredFleet = named(request, "fleet", identity, body)
    return fleet


@router.delete("/{identity}", status_code=204, responses=errors(404, 409), summary="Delete a fleet")
async def delete_fleet(request: Request, identity: Identity) -> None:
    """Its members' plans stay. 409 while a job needs it."""
    service_of(request).supervisor.delete_file("fleet", identity)


@router.get("/{identity}/file", responses=FILE, summary="The whole plan of a fleet", response_class=Response)
async def get_fleet_file(request: Request, identity: Identity) -> Response:
    """Its members' plans are at `/v1/plans/{id}/file`, by the ids in `plans` of its summary."""
    return await file_response(request, stored(request, "fleet", identity))


@router.get(
    "/{identity}/view", response_model=FleetView, responses=errors(404), summary="The plan of a fleet to look at"
)
async def get_fleet_view(request: Request, identity: Identity) -> Response:
    """Sentences, tables, and what each device and each link does when: what the page shows."""
    return await service_of(request).views.answer(request, "fleet", [stored(request, "fleet", identity)])
