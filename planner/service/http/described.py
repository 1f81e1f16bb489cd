"""What the API's description says of fields and answers that several routes have."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, Query, Request

from tightfit.planner.service.http.service import Service
from tightfit.planner.service.wire.errors import Code
from tightfit.planner.service.wire.schema import JOB, ErrorAnswer, ServiceJob

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="a name of your choice for this request: sent again, it is the same job",
    ),
]
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", description="`id` of the last event that was received of a stream that broke off"),
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
