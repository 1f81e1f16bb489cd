"""``/v1/previews``: data as a run would read them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from tightfit.planner.service.http.routes_common import (
    JOB_RESPONSES,
    IdempotencyKey,
    check_measured_here,
    data_path,
    enqueue,
    stored,
)
from tightfit.planner.service.wire.inputs import uploaded
from tightfit.planner.service.wire.requests import PreviewRequest

router = APIRouter(prefix="/v1/previews", tags=["inputs"])


@router.post("", status_code=202, responses=JOB_RESPONSES, summary="Show data as a run would read them")
async def make_preview(request: Request, body: PreviewRequest, key: IdempotencyKey = None) -> Response:
    """The result has the first samples in pieces, learned or not, the lines that are refused, what is cut, and the
    share of padding.
    """
    check_measured_here(stored(request, "profile", body.profile, "profile"), "profile")
    job_request = body.model_dump() | {"data": await data_path(request, body.data, "data")}
    upload = uploaded(body.data)
    uses = [("profile", body.profile), *([] if upload is None else [("upload", upload)])]
    # A file under a root may be another one tomorrow.
    return enqueue(request, "preview", job_request, key=key, uses=uses, repeatable=upload is None)
