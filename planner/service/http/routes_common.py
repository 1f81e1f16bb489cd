"""Helpers that the routes share: the service behind a request, answers about jobs, answers with stored files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Header, Query, Request, Response
from starlette.responses import StreamingResponse

from tightfit.planner.service.http.paths import confined
from tightfit.planner.service.http.service import Service
from tightfit.planner.service.jobs.store import Row, content_key, listed
from tightfit.planner.service.jobs.supervisor import lane_of
from tightfit.planner.service.wire.errors import Code, ServiceError, invalid, not_found
from tightfit.planner.service.wire.inputs import uploaded
from tightfit.planner.service.wire.requests import NameRequest
from tightfit.planner.service.wire.schema import FINISHED, JOB, ErrorAnswer, JobKind, ServiceJob
from tightfit.planner.service.wire.settings import Settings
from tightfit.profiles.devices.data_sheets import known_devices
from tightfit.profiles.schema import MOBILLM

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="a name of your choice for this request: sent again, it is the same job",
    ),
]
Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[
    str | None,
    Query(
        pattern=r"^\d{1,15}(\.\d{1,9})?_[0-9a-z-]{20,64}$", description="`next` of the answer before: what follows it"
    ),
]
Search = Annotated[
    str | None,
    Query(max_length=200, description="words that all stand in title, note, label or id, in capitals or not"),
]


ERRORS: dict[int, tuple[str, Code, str, str | None]] = {
    400: ("The body is no JSON", "invalid_request", "body.11: JSON decode error", "body.11"),
    401: ("No token, or a wrong one", "unauthorized", "send the service's token", "header.Authorization"),
    404: ("There is none", "not_found", "there is no plan '3f1c0e9d'; it may have been removed by retention", None),
    408: (
        "The headers or the body did not come in time",
        "request_timeout",
        "the body did not come within 60 s",
        "body",
    ),
    409: ("The state of things forbids it", "conflict", f"the job {JOB} is succeeded already", None),
    413: ("Too large", "too_large", "the body unpacks to more than 67108864 bytes", "body"),
    415: (
        "A content type or encoding that is not understood",
        "unsupported_media_type",
        "the content type 'text/plain' is not understood; send application/json",
        "header.Content-Type",
    ),
    422: (
        "A field is wrong; it is named",
        "invalid_request",
        "'350M' is not a size; write plain bytes (367001600), 350MB or 350MiB",
        "body.memory",
    ),
    429: (
        "Too many jobs are waiting",
        "busy",
        "1000 jobs are waiting already; ask again in a minute",
        None,
    ),
}
"""status -> what it means, and an example's code, message and field"""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses for the API description."""
    return {status: _error(*ERRORS[status]) for status in statuses}


def _error(description: str, code: Code, message: str, field: str | None) -> dict[str, Any]:
    fields = [] if field is None else [{"field": field, "message": message}]
    example = {"error": {"code": code, "message": message, "fields": fields}}
    return {"model": ErrorAnswer, "description": description, "content": {"application/json": {"example": example}}}


EVERYWHERE = errors(401, 422) | {
    "default": _error(
        "Any other error has the same form", "misdirected", "this service answers to localhost", "header.Host"
    )
}
JOB_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": ServiceJob, "description": "The job of an earlier, equal request has its result already"},
    202: {"model": ServiceJob, "description": "A job that waits or runs"},
    **errors(400, 404, 408, 409, 413, 415, 429),
}


def described_file(description: str, example: Any, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that answers with a JSON file."""
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {
        200: {"description": description, "content": content},
        **errors(404, *statuses),
    }


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def check_query(request: Request) -> None:
    """Raises ServiceError 422 for a query field under /v1 that the route does not have, which would be passed over
    without a word.
    """
    known = [str(field.alias) for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if request.url.path.startswith("/v1/") and name not in known:
            choice = f"choose from {', '.join(known)}" if known else "there are none here"
            message = f"no query field is called {name[:80]!r}; {choice}"
            raise ServiceError(422, "invalid_request", message, f"query.{name[:80]}")


def enqueue(
    request: Request,
    kind: JobKind,
    job_request: Row,
    *,
    key: str | None,
    uses: Sequence[tuple[str, str]] = (),
    repeatable: bool = False,
    renews: Row | None = None,
) -> Response:
    """The answer to a request for a job. Unless `repeatable`, equal requests are one job.

    With `renews`, the request whose answer is to be made anew, only a job that has not ended answers.
    """
    service = service_of(request)
    lane = lane_of(kind)
    job, new = service.store.enqueue(
        kind,
        lane,
        job_request,
        content=None if repeatable else content_key(kind, job_request),
        key=key,
        waiting=service.settings.waiting,
        uses=uses,
        renews=None if renews is None else content_key(kind, renews),
    )
    if new:
        service.supervisor.wake(lane)
    return job_response(service.events.shown(job))


def job_response(job: ServiceJob) -> Response:
    finished = job.state in FINISHED
    return Response(
        job.model_dump_json(),
        status_code=200 if finished else 202,
        media_type="application/json",
        headers={"Location": f"/v1/jobs/{job.id}"} | ({} if finished else {"Retry-After": "1"}),
    )


def check_time(seconds: float, settings: Settings) -> None:
    """Raises ServiceError 422 for a time limit above the service's."""
    if seconds > settings.time_limit_seconds:
        limit = settings.time_limit_seconds
        raise invalid("time_limit", f"{seconds} s for one plan; this service allows at most {limit:g} s")


def check_device(name: str, own: Sequence[str], field: str) -> None:
    """Raises ServiceError 422 for a device that is neither one of `own` nor one with a data sheet."""
    known = [*own, *(device.name for device in known_devices())]
    if name not in known:
        raise invalid(field, f"no device is called {name!r}; choose from {', '.join(known)}")


def stored(request: Request, kind: str, identity: str, field: str | None = None) -> Row:
    """A stored file's row. Raises ServiceError 404, naming the field that asked for it."""
    store = service_of(request).store
    row = store.file(kind, identity)
    if row is None:
        error = store.missing(kind, identity)
        raise ServiceError(error.status, error.code, str(error), field and f"body.{field}")
    return row


def named(request: Request, kind: str, identity: str, body: NameRequest) -> Any:
    """A stored file as it is listed, with the title and note that the request gives it. Raises ServiceError 404."""
    stored(request, kind, identity)
    service_of(request).store.name_file(kind, identity, body.model_dump(exclude_unset=True))
    return listed(stored(request, kind, identity))


async def file_response(
    request: Request,
    row: Row,
    *,
    media_type: str = "application/json",
    name: str | None = None,
) -> Response:
    """A stored file's content, as it lies there where the client takes gzip. Raises UnreadableError where it is
    damaged.
    """
    objects = service_of(request).objects
    headers = {"Vary": "Accept-Encoding"}
    if name is not None:
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
    await asyncio.to_thread(objects.check, row["digest"])
    if media_type == "application/json" and "gzip" in request.headers.get("accept-encoding", ""):
        return Response(
            objects.packed(row["digest"]), media_type=media_type, headers=headers | {"Content-Encoding": "gzip"}
        )
    return StreamingResponse(objects.unpack(row["digest"]), media_type=media_type, headers=headers)


def check_measured_here(profile: Row, field: str) -> None:
    """Raises ServiceError 422 where the model of a stored profile is not there to be used."""
    if profile["origin"] == "made":
        return
    message = (
        "this profile was not made by this service; measure the model on the service's machine, and ask with that"
        " profile"
    )
    if profile["origin"] == "example":
        message = (
            f"the example was measured on another machine; put {profile['name']} under a folder of the service, and"
            " measure it there"
        )
    raise invalid(field, message)


async def data_path(request: Request, data: str, field: str) -> str:
    """Data that a request names, as a worker gets them: an upload as it is named, a path in full.

    Raises ServiceError 422 for what lies outside the roots, and 404 for an upload that is not there.
    """
    identity = uploaded(data)
    if identity is None:
        return await asyncio.to_thread(confined, data, service_of(request).settings.roots, field)
    stored(request, "upload", identity, field)
    return data


def not_runnable(request: Request, plan: Row) -> str | None:
    """Why a stored plan cannot be run on this machine; None where it can."""
    summary = json.loads(plan["summary"])
    if summary["status"] == "infeasible":
        return f"the plan {plan['id']} has no schedule: its budget is too small; plan again with more memory"
    if summary["policy"] == MOBILLM:
        return (
            f"the plan {plan['id']} is a device's part of {MOBILLM}, and the server's has to run beside it; plan both"
            f" with `tightfit fleet plan --kind {MOBILLM}` and run the fleet: `tightfit fleet run`"
        )
    profile = service_of(request).store.file("profile", plan["origin"])
    if profile is not None and profile["origin"] == "example":
        return (
            f"this plan is of the example, which was measured on another machine; put {profile['name']} under a folder"
            " of the service, measure it there, plan and run that"
        )
    if profile is None or profile["origin"] != "made":
        # An uploaded profile's operators and paths are a stranger's: they are planned with, never executed.
        return (
            "this plan's profile was not made by this service; measure the model on the service's machine, plan and run"
            " that"
        )
    if summary.get("elsewhere"):
        return (
            f"the plan {plan['id']} is for {summary['elsewhere']} with estimated times; plan for this machine and run"
            " that"
        )
    return None


def cached_of(request: Request, identity: str) -> list[str]:
    """Files of the cache that a run of a plan of that profile reads: packed weights, a config that was sent. They are
    in use now.
    """
    store = service_of(request).store
    profile = store.file("profile", identity)
    names: list[str] = [] if profile is None else json.loads(profile["summary"]).get("cached", [])
    for name in names:
        store.touch("cache", name)
    return names


def run_of(request: Request, identity: str) -> ServiceJob:
    job = service_of(request).store.job(identity)
    if job.kind != "run":
        raise not_found("run", identity)
    return job


def file_of_run(request: Request, identity: str, kind: str) -> Row:
    job = run_of(request, identity)
    row = service_of(request).store.file(kind, identity)
    if row is None:
        raise ServiceError(409, "conflict", f"the run {identity} is {job.state} and has left no {kind}")
    return row
