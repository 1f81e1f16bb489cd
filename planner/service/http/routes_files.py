"""``/v1/files``, ``/v1/gallery`` and ``/v1/uploads``: what there is to choose from, so that no path is typed."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from tightfit.planner.service.http.root_files import files_under, parameters
from tightfit.planner.service.http.routes_common import After, Limit, Search, errors, service_of
from tightfit.planner.service.jobs.store import listed
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.inputs import FilesAnswer, FilesKind, Gallery, Shape, StoredUpload, UploadList
from tightfit.planner.service.wire.schema import Digest
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.data.samples import LINES
from tightfit.runtime.data.tables import KINDS

router = APIRouter(prefix="/v1", tags=["inputs"])
READ = (*LINES, *KINDS, ".json")
"""how the names of files of samples end"""
UploadName = Annotated[
    str,
    Query(
        max_length=200,
        pattern=r"^[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]*$",
        description=f"the file's name, which says what it holds: it ends with {', '.join(READ)}",
        examples=["samples.jsonl"],
    ),
]
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "/uploads",
    status_code=201,
    response_model=StoredUpload,
    responses={200: {"model": StoredUpload, "description": "It was here already"}, **errors(400, 408, 413, 415, 429)},
    openapi_extra=BODY,
    summary="Upload a file of samples",
)
async def upload_data(request: Request, name: UploadName) -> Response:
    """The body is the file as it is. A run and a preview take it as data by the name `upload:` and its id; it is kept
    as long as other results are.
    """
    if not name.lower().endswith(READ) or len(name.encode()) > 200:
        message = f"{name!r} names no file of samples; they end with {', '.join(READ)}, and have at most 200 bytes"
        raise ServiceError(422, "invalid_request", message, "query.name")
    row, new = await service_of(request).uploads.receive_data(request, name)
    return Response(listed(row).model_dump_json(), status_code=201 if new else 200, media_type="application/json")


@router.delete("/uploads/{identity}", status_code=204, responses=errors(404, 409), summary="Delete an uploaded file")
async def delete_upload(request: Request, identity: Annotated[Digest, Path()]) -> None:
    """Runs of it stay. 409 while a job needs it."""
    service_of(request).supervisor.delete_file("upload", identity)


@router.get("/uploads", response_model=UploadList, summary="Uploaded files of samples, newest first")
async def list_uploads(request: Request, limit: Limit = 100, after: After = None, search: Search = None) -> UploadList:
    store = service_of(request).store
    rows = store.files("upload", search=search, after=after, limit=limit)
    return UploadList(uploads=[listed(row) for row in rows.items], next=rows.next, set_aside=store.set_aside("upload"))


@router.get("/files", response_model=FilesAnswer, summary="Models and data under the roots, newest first")
async def list_files(request: Request, kind: FilesKind) -> FilesAnswer:
    """Of models, headers are read and no weights. What a request could not name is left out."""
    return await asyncio.to_thread(files_under, service_of(request).settings.roots, kind)


@router.get("/gallery", response_model=Gallery, summary="Sizes of published models, to plan for without their weights")
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
