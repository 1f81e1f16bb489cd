"""``/v1/profiles``: what was measured; uploaded, or made on this machine."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from tightfit.planner.service.http.paths import confined
from tightfit.planner.service.http.routes_common import (
    JOB_RESPONSES,
    After,
    IdempotencyKey,
    Limit,
    Search,
    check_device,
    described_file,
    enqueue,
    errors,
    file_response,
    named,
    service_of,
    stored,
)
from tightfit.planner.service.jobs.orders import LOCAL
from tightfit.planner.service.jobs.store import Row, listed
from tightfit.planner.service.wire.bundles import check_config
from tightfit.planner.service.wire.errors import invalid
from tightfit.planner.service.wire.requests import NameRequest, ProfileRequest
from tightfit.planner.service.wire.schema import Digest, ProfileList, StoredProfile
from tightfit.planner.service.wire.settings import Settings
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.profiles.sources.file_header import model_of_header
from tightfit.profiles.weights.precision import precision
from tightfit.runtime.common.errors import InputError

router = APIRouter(prefix="/v1/profiles", tags=["profiles"])
Identity = Annotated[Digest, Path(description="sha256 of the profile's content")]
WithPlans = Annotated[bool, Query(description="delete the plans of the profile too")]
FILE = described_file("profile.json as `tightfit profile` writes it", {"format": "tightfit-profile", "layers": []})
ALWAYS = {"seq", "batch", "lora_alpha", "accumulate", "dtype"}
"""fields of a request that always go to the worker; the others only if they are not at their defaults"""
RANK = 8
"""rank of the LoRA pairs, where a request names neither a rank nor an adapter"""
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "description": "a profile.json as `tightfit profile` writes it"},
                "examples": {
                    "cut": {"summary": "the first fields", "value": {"version": PROFILE_VERSION, "layers": []}}
                },
            }
        },
    }
}


@router.post("", status_code=202, responses=JOB_RESPONSES, summary="Measure a model on this machine")
async def make_profile(request: Request, body: ProfileRequest, key: IdempotencyKey = None) -> Response:
    """Waits for this machine's device: measurements and runs follow each other.

    What was measured before is answered at once; `force` measures anew, and the new profile answers from then on.
    """
    settings = service_of(request).settings
    check_device(body.device, [LOCAL], "device")
    options = body.model_dump(include=ALWAYS)
    options |= body.model_dump(exclude={"path", "hub", "config", "header", "force"}, exclude_defaults=True)
    for field in ("adapter", "bundle"):
        if (path := getattr(body, field)) is not None:
            options[field] = await asyncio.to_thread(confined, path, settings.roots, field)
    if body.adapter is None and body.bundle is None:
        options["lora_rank"] = body.lora_rank or RANK
    job_request = options | await asyncio.to_thread(_source, settings, body)
    if not body.force:
        return enqueue(request, "profile", job_request, key=key)
    return enqueue(request, "profile", job_request | {"force": True}, key=key, renews=job_request)


def _source(settings: Settings, body: ProfileRequest) -> Row:
    """The model as a worker gets it: a path or hub id as `source`, or a `config`, of a header with its precision.
    Raises ServiceError 422.
    """
    if body.path is not None:
        return {"source": confined(body.path, settings.roots, "path")}
    if body.hub is not None:
        if not settings.hub:
            raise invalid("hub", "this service downloads nothing; start it with --hub, or name a path")
        return {"source": body.hub}
    if body.header is not None:
        try:
            config, base, embeddings = model_of_header(body.header, precision(body.base, body.embeddings))
        except InputError as error:
            raise invalid("header", str(error)) from error
        check_config(config, "header")
        return {"config": config, "base": base, "embeddings": embeddings}
    check_config(body.config, "config")
    return {"config": body.config}


@router.post(
    "/upload",
    status_code=201,
    response_model=StoredProfile,
    responses={200: {"model": StoredProfile, "description": "It was here already"}, **errors(400, 408, 413, 415, 429)},
    openapi_extra=UPLOAD,
    summary="Upload a profile",
)
async def upload_profile(request: Request) -> Response:
    """The body is a profile.json, plain or gzip. It can be planned; only profiles made here can also be run here."""
    row, new = await service_of(request).uploads.receive(request, "profile")
    return Response(listed(row).model_dump_json(), status_code=201 if new else 200, media_type="application/json")


@router.get("", response_model=ProfileList, summary="Profiles, newest first")
async def list_profiles(
    request: Request, limit: Limit = 100, after: After = None, search: Search = None
) -> ProfileList:
    store = service_of(request).store
    rows = store.files("profile", search=search, after=after, limit=limit)
    return ProfileList(
        profiles=[listed(row) for row in rows.items], next=rows.next, set_aside=store.set_aside("profile")
    )


@router.get("/{identity}", response_model=StoredProfile, responses=errors(404), summary="A profile in figures")
async def get_profile(request: Request, identity: Identity) -> StoredProfile:
    profile: StoredProfile = listed(stored(request, "profile", identity))
    return profile


@router.patch(
    "/{identity}",
    response_model=StoredProfile,
    responses=errors(400, 404, 408, 413, 415),
    summary="Call a profile by a name",
)
async def name_profile(request: Request, identity: Identity, body: NameRequest) -> StoredProfile:
    profile: StoredProfile = named(request, "profile", identity, body)
    return profile


@router.delete("/{identity}", status_code=204, responses=errors(404, 409), summary="Delete a profile")
async def delete_profile(request: Request, identity: Identity, with_plans: WithPlans = False) -> None:
    """409 while a job needs it, or plans of it exist."""
    service_of(request).supervisor.delete_file("profile", identity, with_plans=with_plans)


@router.get("/{identity}/file", responses=FILE, summary="The whole profile", response_class=Response)
async def get_profile_file(request: Request, identity: Identity) -> Response:
    return await file_response(request, stored(request, "profile", identity))
