"""Uploads: how large a body may be, as sent and unpacked, and how large the graph that it describes."""

from __future__ import annotations

from fastapi import Request as HttpRequest

from planner.graph import step_graph
from planner.service.errors import ServiceError, invalid
from planner.service.objects import gunzip
from planner.service.settings import Settings
from profiles.errors import InputError
from profiles.exchange import parse_profile
from profiles.schema import Profile


async def read_body(request: HttpRequest, limit: int) -> bytes:
    """The request's body, unpacked. Raises ServiceError for one over the limit, and for encodings other than gzip."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", "gzip"}:
        raise ServiceError(
            415, "unsupported_media_type", f"the content encoding {encoding!r} is not understood; send gzip or none",
            "header.Content-Encoding",
        )  # fmt: skip
    body = await request.body()
    if encoding == "gzip":
        try:
            body = gunzip(body, limit)
        except OverflowError:
            raise ServiceError(413, "too_large", f"the body unpacks to more than {limit} bytes", "body") from None
        except ValueError as error:
            raise ServiceError(
                400, "invalid_request", f"the body is said to be gzip, but is {error}", "body"
            ) from error
    return body


def checked_profile(body: bytes, settings: Settings) -> Profile:
    """The profile that was uploaded. Raises ServiceError for one that is none, contradicts itself or is too large."""
    try:
        found = parse_profile(body, "the upload")
        check_size(found, settings)
        step_graph(found)
    except (InputError, RecursionError) as error:
        raise ServiceError(422, "invalid_request", str(error), "body") from error
    return found


def check_size(profile: Profile, settings: Settings) -> None:
    """Layers share programs, so a small file can describe a large graph: what counts is what the planner unrolls."""
    operators = {program.name: len(program.operators) for program in profile.programs}
    values = {program.name: len(program.values) for program in profile.programs}
    for word, counts, limit, more in (
        ("operators", operators, settings.steps, 0),
        ("tensors", values, settings.tensors, len(profile.tensors)),
    ):
        total = more + sum(counts.get(layer.program, 0) for layer in profile.layers)
        if total > limit:
            raise invalid("layers", f"the profile unrolls to {total} {word}; this service plans at most {limit}")
