"""``/v1/answers``: a model that was measured here, asked with a run's adapter or without."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from tightfit.planner.service.http.routes_common import (
    JOB_RESPONSES,
    IdempotencyKey,
    cached_of,
    check_measured_here,
    enqueue,
    file_of_run,
    stored,
)
from tightfit.planner.service.wire.requests import AnswerRequest

router = APIRouter(prefix="/v1/answers", tags=["runs"])


@router.post("", status_code=202, responses=JOB_RESPONSES, summary="Ask a model")
async def make_answer(request: Request, body: AnswerRequest, key: IdempotencyKey = None) -> Response:
    """Waits for this machine's device, as runs do. Progress has the text so far; every request is answered anew."""
    profile = stored(request, "profile", body.profile, "profile")
    check_measured_here(profile, "profile")
    uses = [("profile", body.profile), *(("cache", name) for name in cached_of(request, body.profile))]
    if body.run is not None:
        file_of_run(request, body.run, "adapter")
        uses.append(("adapter", body.run))
    return enqueue(request, "answer", body.model_dump(), key=key, uses=uses, repeatable=True)
