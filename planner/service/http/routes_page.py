"""The page: files of this package and the charts of ``planner.report``, nothing from elsewhere."""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from tightfit.planner.report.chart_data import shared_files
from tightfit.planner.service.http.described import service_of
from tightfit.planner.service.wire.errors import not_found
from tightfit.planner.service.wire.forms import forms

router = APIRouter(include_in_schema=False)
FORMS = "forms.json"
"""the file that describes the fields of the page's forms"""
NOWHERE = "nowhere.html"
"""the file that a browser gets in place of one that does not exist"""
TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "json": "application/json",
    "svg": "image/svg+xml",
}


@router.get("/")
async def root() -> Response:
    return RedirectResponse("/page/")


@router.get("/page/")
async def index(request: Request) -> Response:
    service_of(request).views.prepare()  # whoever opens the page is about to look at a plan
    return _file(request, "index.html")


@router.get("/page/{name}")
async def part(request: Request, name: str) -> Response:
    return _file(request, name)


def nowhere() -> Response:
    """What a browser is shown at an address where nothing is."""
    return Response(gzip.decompress(_files()[NOWHERE]), status_code=404, media_type=f"{TYPES['html']}; charset=utf-8")


def _file(request: Request, name: str) -> Response:
    packed = _files().get(name)
    if packed is None and "text/html" in request.headers.get("accept", ""):
        return nowhere()
    if packed is None:
        raise not_found("page", name)
    kind = f"{TYPES[name.rsplit('.', 1)[-1]]}; charset=utf-8"
    headers = {"Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(packed, media_type=kind, headers=headers | {"Content-Encoding": "gzip"})
    return Response(gzip.decompress(packed), media_type=kind, headers=headers)


@cache
def _files() -> dict[str, bytes]:
    """The files of the page by name, packed with gzip."""
    folder: Any = files("tightfit.planner.service") / "page"
    texts = {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.name.rsplit(".", 1)[-1] in TYPES}
    texts |= shared_files() | {FORMS: json.dumps(forms())}
    return {name: gzip.compress(text.encode(), mtime=0) for name, text in texts.items()}
