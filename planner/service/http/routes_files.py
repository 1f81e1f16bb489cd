"""``/v1/files`` and ``/v1/gallery``: what there is to choose from, so that no path is typed and no file is needed."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request

from tightfit.planner.service.http.root_files import files_under, parameters
from tightfit.planner.service.http.routes_common import service_of
from tightfit.planner.service.wire.inputs import FilesAnswer, FilesKind, Gallery, Shape
from tightfit.runtime.common.strict_json import from_json

router = APIRouter(prefix="/v1", tags=["inputs"])


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
