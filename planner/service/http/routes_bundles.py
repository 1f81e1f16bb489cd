"""``/v1/bundles``: a bundle of a model, for a device that has its weights and too little memory to trace it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from tightfit.planner.service.http.routes_common import (
    JOB_RESPONSES,
    IdempotencyKey,
    described_file,
    enqueue,
    file_response,
    service_of,
    stored,
)
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.schema import DESCRIPTION, Digest
from tightfit.runtime.common.units import format_size

router = APIRouter(prefix="/v1/bundles", tags=["planning"])
Identity = Annotated[Digest, Path(description="sha256 of the content, `result.bundle` of the job")]
LEAST_JOB_BYTES = 512 << 20
"""private memory of a process that traces a model: 352 MiB for two layers and 389 for thirty, PyTorch's own most of
it
"""
FILE = described_file(
    "bundle.json as `tightfit prepare` writes it: the traced step and answers, and what they were traced of",
    {"checksum": "3f1c…", "bundle": {"version": 11, "request": {"name": "SmolLM2-135M"}}},
)
REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "description": (
                        "`name` and `config`: a model's name and configuration; `stored`: of a decoder that"
                        " transformers builds, the names of the tensors in its checkpoint; `options`: the fields of a"
                        " request for a profile that say what is traced; `lora`: the settings of an adapter"
                    ),
                },
                "examples": {"cut": {"summary": "some fields of a configuration", "value": DESCRIPTION}},
            }
        },
    }
}


@router.post(
    "",
    status_code=202,
    responses=JOB_RESPONSES,
    openapi_extra=REQUEST,
    summary="Make a bundle of a model for a device, from its configuration",
)
async def make_bundle(request: Request, key: IdempotencyKey = None) -> Response:
    """The body is a `tightfit.profiles.sources.bundle.BundleRequest`, plain or gzip. No weights and no data pass.
    Whatever the config names, no code is fetched or run: models are those of tightfit and those of the service's own
    transformers.
    """
    service = service_of(request)
    if service.settings.solve_bytes < LEAST_JOB_BYTES:
        message = (
            f"a job of this service may take {format_size(service.settings.solve_bytes)}, and tracing takes"
            f" {format_size(LEAST_JOB_BYTES)}; start it with --memory {LEAST_JOB_BYTES >> 20}MiB or more, or copy the"
            " bundle that `tightfit prepare` makes on another machine"
        )
        raise ServiceError(422, "invalid_request", message)
    description, _ = await service.uploads.receive(request, "description")
    identity = description["id"]
    job_request = {"description": identity, "model": description["name"]}
    return enqueue(request, "bundle", job_request, key=key, uses=[("description", identity)])


@router.get("/{identity}/file", responses=FILE, summary="A bundle", response_class=Response)
async def get_bundle_file(request: Request, identity: Identity) -> Response:
    return await file_response(request, stored(request, "bundle", identity))
