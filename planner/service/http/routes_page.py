"""The page: files of this package and the charts of ``planner.report``, nothing from elsewhere."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from tightfit.planner.report.chart_data import shared_files
from tightfit.planner.service.http.routes_common import service_of
from tightfit.planner.service.wire.errors import not_found
from tightfit.planner.service.wire.forms import forms

router = APIRouter(include_in_schema=False)
FORMS = "forms.json"
"""the file that describes the fields of the page's forms"""
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
    return _file("index.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    texts = _files()
    if name not in texts:
        raise not_found("page", name)
    kind = TYPES[name.rsplit(".", 1)[-1]]
    return Response(texts[name], media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"})


@cache
def _files() -> dict[str, str]:
    folder: Any = files("tightfit.planner.service") / "page"
    texts = {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.name.rsplit(".", 1)[-1] in TYPES}
    return texts | shared_files() | {FORMS: json.dumps(forms())}
