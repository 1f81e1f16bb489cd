"""One router over what the service does and keeps: `KINDS` of jobs are asked for, `THINGS` are listed, named,
downloaded and deleted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from tightfit.planner.service.http.described import (
    JOB_RESPONSES,
    After,
    IdempotencyKey,
    LastEventId,
    Limit,
    Search,
    described_file,
    errors,
    service_of,
)
from tightfit.planner.service.http.guard import BYTES, JSON
from tightfit.planner.service.http.parts import TAR
from tightfit.planner.service.http.things import THINGS
from tightfit.planner.service.jobs.kinds import KINDS, JobKind, run_of
from tightfit.planner.service.jobs.store import listed
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.requests import NameRequest, RunRequest
from tightfit.planner.service.wire.schema import (
    DIGEST,
    FINISHED,
    STORED_PLAN,
    Digest,
    JobId,
    JobState,
    Listed,
    ServiceJob,
    StoredFile,
)
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.data.samples import LINES
from tightfit.runtime.data.tables import KINDS as TABLES


class _Lists(StringConvertor):
    regex = "|".join(THINGS)


class _Ids(StringConvertor):
    regex = "[0-9a-f]{64}|job-[0-9a-f]{16}"


register_url_convertor("lists", _Lists())  # what they do not match is not there: 404
register_url_convertor("ids", _Ids())
router = APIRouter(prefix="/v1")
ListName = Annotated[str, Path(json_schema_extra={"enum": list(THINGS)})]
Identity = Annotated[str, Path(pattern=f"^({_Ids.regex})$", examples=[DIGEST])]
JobIdentity = Annotated[JobId, Path()]
PartName = Annotated[
    str,
    Path(
        json_schema_extra={"enum": sorted({part for things in THINGS.values() for part in things.parts})},
        description="; ".join(f"{name}: {', '.join(things.parts)}" for name, things in THINGS.items() if things.parts),
    ),
]
Asked = Annotated[
    bool,
    Query(
        description=(
            "of plans: only those that somebody named, used or asked for, not those made for a comparison alone or to"
            " learn of the smallest budget"
        )
    ),
]
KindQuery = Annotated[str | None, Query(description="of jobs", json_schema_extra={"enum": list(KINDS)})]
StateQuery = Annotated[JobState | None, Query(description="of jobs and runs")]
OfProfile = Annotated[Digest | None, Query(description="of plans: what they were made from")]
WithPlans = Annotated[bool, Query(description="of a profile: delete its plans too")]
OWN_QUERIES = frozenset(name for things in THINGS.values() for name in things.queries)
"""query fields that only some lists have"""
ONE: dict[int | str, dict[str, Any]] = {
    200: {"description": "A stored file, or a job", "content": {JSON: {"example": STORED_PLAN}}}
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
PART: dict[int | str, dict[str, Any]] = {
    200: {
        "description": (
            "JSON as the command line writes it (file, report), or as the page shows it (view, timeline, metrics); a"
            " tar file (adapter); what was merged, or samples as they are"
        ),
        "content": {
            JSON: {
                "schema": {"type": "object"},
                "example": {"status": "optimal", "peak_bytes": 366897152},
            },
            TAR: BINARY,
            BYTES: BINARY,
        },
    },
    **errors(404, 409),
}
CHANGES = described_file(
    "Both plans in figures, changes by sort, and tensor by tensor, the largest first",
    {"groups": [{"kind": "activation", "before": "recomputed", "after": "kept", "tensors": 30}], "left_out": 0},
)
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
SAMPLES = (*LINES, *TABLES, ".json")
"""how the names of files of samples end"""
Uploaded = Literal["profile", "description", "samples"]
UploadName = Annotated[
    str | None,
    Query(
        max_length=200,
        pattern=r"^[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]*$",
        description=f"of samples: the file's name, which says what it holds: it ends with {', '.join(SAMPLES)}",
        examples=["samples.jsonl"],
    ),
]
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "description": (
                        "a profile.json as `tightfit profile` writes it; or the description of a model of which a"
                        " bundle is wanted, a `tightfit.profiles.sources.bundle.BundleRequest`: `name` and `config`; of"
                        " a decoder that transformers builds, as `stored`, the names of the tensors in its checkpoint;"
                        " as `options` the fields of a request for a profile that say what is traced; as `lora` the"
                        " settings of an adapter"
                    ),
                },
                "examples": {
                    "cut": {"summary": "the first fields", "value": {"version": PROFILE_VERSION, "layers": []}}
                },
            },
            BYTES: BINARY,
        },
    }
}


async def check_query(request: Request) -> None:
    """Raises ServiceError 422 for a query field under /v1 that the route does not have, which would be passed over
    without a word.
    """
    known = [str(field.alias) for field in request.scope["route"].dependant.query_params]
    things = THINGS.get(request.path_params.get("things", ""))
    if things is not None:
        known = [name for name in known if name not in OWN_QUERIES or name in things.queries]
    for name in request.query_params:
        if request.url.path.startswith("/v1/") and name not in known:
            choice = f"choose from {', '.join(known)}" if known else "there are none here"
            message = f"no query field is called {name[:80]!r}; {choice}"
            raise ServiceError(422, "invalid_request", message, f"query.{name[:80]}")


# --- work -------------------------------------------------------------------------------------------------------------


def _asking(name: str, kind: JobKind) -> Callable[..., Awaitable[Response]]:
    async def ask(request: Request, body: Any, key: IdempotencyKey = None) -> Response:
        return job_response(await service_of(request).supervisor.ask(name, body, key))

    ask.__annotations__ |= {"body": kind.request}
    return ask


for _name, _kind in KINDS.items():
    router.add_api_route(
        f"/{_kind.address}",
        _asking(_name, _kind),
        methods=["POST"],
        status_code=202,
        responses=JOB_RESPONSES,
        summary=_kind.summary,
        description=_kind.check.__doc__,
        operation_id=f"ask_for_{_name}",
        tags=["jobs"],
    )


def job_response(job: ServiceJob) -> Response:
    finished = job.state in FINISHED
    return Response(
        job.model_dump_json(),
        status_code=200 if finished else 202,
        media_type=JSON,
        headers={"Location": f"/v1/jobs/{job.id}"} | ({} if finished else {"Retry-After": "1"}),
    )


@router.post(
    "/runs/{identity}/resume",
    status_code=202,
    response_model=ServiceJob,
    responses=errors(404, 409, 429),
    tags=["jobs"],
    summary="Go on with a run",
)
async def resume_run(request: Request, identity: JobIdentity, key: IdempotencyKey = None) -> Response:
    """A run that was cancelled, failed or interrupted goes on from its checkpoint. 409 where it has not ended so.

    What it reads is allowed or refused as for a new run: the service may have been started with other roots since.
    """
    service = service_of(request)
    body = RunRequest(**run_of(service.store, identity).request)
    await KINDS["run"].check(service.store, service.settings, body)
    return job_response(service.supervisor.resume(identity, key))


@router.post(
    "/jobs/{identity}/cancel",
    response_model=ServiceJob,
    responses=errors(404, 409),
    tags=["jobs"],
    summary="End a job",
)
async def cancel_job(request: Request, identity: JobIdentity) -> ServiceJob:
    """A run ends with a checkpoint. 409 where the job has ended already."""
    service = service_of(request)
    job = service.store.job(identity)
    if job.state in FINISHED:
        raise ServiceError(409, "conflict", f"the job {identity} is {job.state} already")
    return service.supervisor.cancel(identity)


@router.get(
    "/jobs/{identity}/events",
    responses=EVENTS,
    response_class=StreamingResponse,
    tags=["jobs"],
    summary="What happens to a job, as server-sent events",
)
async def get_events(request: Request, identity: JobIdentity, last_event_id: LastEventId = None) -> StreamingResponse:
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


# --- what is kept -----------------------------------------------------------------------------------------------------


@router.post(
    "/uploads/{kind}",
    status_code=201,
    response_model=StoredFile,
    responses={200: {"model": StoredFile, "description": "It was here already"}, **errors(400, 408, 413, 415, 429)},
    openapi_extra=UPLOAD,
    tags=["kept"],
    summary="Upload a profile, the description of a model, or a file of samples",
)
async def upload(request: Request, kind: Uploaded, name: UploadName = None) -> Response:
    """The body is the file: JSON, plain or gzip, or samples as they are. A profile can be planned; only profiles made
    here can also be run here. A run and a preview take samples as data by the name `upload:` and their id.
    """
    uploads = service_of(request).uploads
    if kind == "samples":
        if name is None or not name.lower().endswith(SAMPLES) or len(name.encode()) > 200:
            message = (
                f"{name!r} names no file of samples; they end with {', '.join(SAMPLES)}, and have at most 200 bytes"
            )
            raise ServiceError(422, "invalid_request", message, "query.name")
        row, new = await uploads.receive_data(request, name)
    else:
        row, new = await uploads.receive(request, kind)
    return Response(listed(row).model_dump_json(), status_code=201 if new else 200, media_type=JSON)


@router.get("/{things:lists}", response_model=Listed, tags=["kept"], summary="What is kept, newest first")
async def list_things(
    request: Request,
    things: ListName,
    kind: KindQuery = None,
    state: StateQuery = None,
    profile: OfProfile = None,
    asked: Asked = False,
    limit: Limit = 100,
    after: After = None,
    search: Search = None,
) -> Listed:
    """Query fields are those that the list has: others are refused."""
    if kind is not None and kind not in KINDS:
        message = f"no kind of job is called {kind[:80]!r}; choose from {', '.join(KINDS)}"
        raise ServiceError(422, "invalid_request", message, "query.kind")
    own = {"kind": kind, "state": state, "profile": profile, "asked": asked}
    own = {name: value for name, value in own.items() if name in THINGS[things].queries}
    return THINGS[things].page(service_of(request), **own, limit=limit, after=after, search=search)


@router.get(
    "/{things:lists}/{identity:ids}",
    response_model=StoredFile | ServiceJob,
    responses={**ONE, **errors(404)},
    tags=["kept"],
    summary="What is kept, in figures",
)
async def get_thing(request: Request, things: ListName, identity: Identity) -> StoredFile | ServiceJob:
    return THINGS[things].get(service_of(request), identity)


@router.patch(
    "/{things:lists}/{identity:ids}",
    response_model=StoredFile | ServiceJob,
    responses={**ONE, **errors(400, 404, 408, 413, 415)},
    tags=["kept"],
    summary="Call it by a name",
)
async def name_thing(
    request: Request, things: ListName, identity: Identity, body: NameRequest
) -> StoredFile | ServiceJob:
    return THINGS[things].name(service_of(request), identity, body.model_dump(exclude_unset=True))


@router.delete(
    "/{things:lists}/{identity:ids}", status_code=204, responses=errors(404, 409), tags=["kept"], summary="Delete it"
)
async def delete_thing(request: Request, things: ListName, identity: Identity, with_plans: WithPlans = False) -> None:
    """409 while a job needs it, or where it is a job that has not ended. Runs of a plan or of an upload stay, a profile
    goes with its plans or not at all. With a run go metrics, report, adapter and checkpoints; plans and profiles that a
    job has made stay.
    """
    own = {"with_plans": with_plans} if "with_plans" in THINGS[things].queries else {}
    THINGS[things].delete(service_of(request), identity, **own)


@router.get(
    "/{things:lists}/{identity:ids}/{part}",
    responses=PART,
    response_class=Response,
    tags=["kept"],
    summary="A file of it, or what the page shows of it",
)
async def get_part(request: Request, things: ListName, identity: Identity, part: PartName) -> Response:
    """409 where it has no such part (yet), as a plan that does not fit has no timeline."""
    answer = THINGS[things].parts.get(part)
    if answer is None:
        raise HTTPException(404)
    return await answer(request, identity)


@router.get(
    "/plans/{identity}/changes/{other}",
    responses=CHANGES,
    tags=["kept"],
    summary="What another plan does otherwise",
    response_class=Response,
)
async def get_changes(request: Request, identity: Digest, other: Digest) -> Response:
    """Tensor by tensor: kept, recomputed, offloaded, streamed, packed, unpacked in this plan and in the other."""
    service = service_of(request)
    rows = [service.store.needed("plan", plan) for plan in (identity, other)]
    return await service.views.answer(request, "changes", rows)
