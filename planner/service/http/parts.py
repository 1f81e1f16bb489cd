"""What can be downloaded or looked at of what is kept: `/v1/{things}/{identity}/{part}`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import FileResponse
from starlette.responses import StreamingResponse

from tightfit.planner.schema import FITTING
from tightfit.planner.service.http.described import service_of
from tightfit.planner.service.http.guard import BYTES, JSON
from tightfit.planner.service.jobs.kinds import file_of_run, not_runnable, run_of
from tightfit.planner.service.jobs.orders import MERGED
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.schema import RunMetrics

Part = Callable[[Request, str], Awaitable[Response]]
"""Answers with a part of what is kept under an id. Raises ServiceError 404 where it is not there, 409 where it has no
such part.
"""
TAR = "application/x-tar"


async def file_response(
    request: Request,
    row: Row,
    *,
    media_type: str = JSON,
    name: str | None = None,
) -> Response:
    """A stored file's content, as it lies there where the client takes gzip. Raises UnreadableError where it is
    damaged.
    """
    objects = service_of(request).objects
    headers = {"Vary": "Accept-Encoding"}
    if name is not None:
        headers["Content-Disposition"] = f"attachment; filename*=utf-8''{quote(name)}"
    await asyncio.to_thread(objects.check, row["digest"])
    if media_type == JSON and "gzip" in request.headers.get("accept-encoding", ""):
        return Response(
            objects.packed(row["digest"]), media_type=media_type, headers=headers | {"Content-Encoding": "gzip"}
        )
    return StreamingResponse(objects.unpack(row["digest"]), media_type=media_type, headers=headers)


async def whole_file(kind: str, request: Request, identity: str) -> Response:
    """The whole file, as the command of its kind writes it."""
    return await file_response(request, service_of(request).store.needed(kind, identity))


async def _samples(request: Request, identity: str) -> Response:
    """A file of samples, as it was uploaded."""
    row = service_of(request).store.needed("upload", identity)
    return await file_response(request, row, media_type=BYTES, name=row["name"])


async def _view(request: Request, identity: str) -> Response:
    """Sentences, memory over the step, what fills the peak, layers with their decisions, channels: what the page
    shows of a plan.
    """
    service = service_of(request)
    row = service.store.needed("plan", identity)
    return await service.views.answer(request, "plan", [row], not_runnable=not_runnable(service.store, row))


async def _timeline(request: Request, identity: str) -> Response:
    """When the cores and the channels do what in a plan's step, which tensors are in memory then, and why each is as it
    is. 409 where nothing fits.
    """
    row = service_of(request).store.needed("plan", identity)
    if json.loads(row["summary"])["status"] not in FITTING:
        raise ServiceError(409, "conflict", f"the plan {identity} has no schedule; plan again with more memory")
    return await service_of(request).views.answer(request, "timeline", [row])


async def _report(request: Request, identity: str) -> Response:
    """A run's report.json: predicted beside measured."""
    return await file_response(request, file_of_run(service_of(request).store, identity, "report"))


async def _adapter(request: Request, identity: str) -> Response:
    """A run's `adapter/` as a tar file; `peft.PeftModel.from_pretrained` takes the folder."""
    row = file_of_run(service_of(request).store, identity, "adapter")
    return await file_response(request, row, media_type=TAR, name=f"adapter-{identity}.tar")


async def _merged(request: Request, identity: str) -> Response:
    """What was merged last of a run: a GGUF file, or a tar file of the folder merged/ with safetensors. 409 before it
    was merged.
    """
    service = service_of(request)
    run_of(service.store, identity)
    job = service.store.job_using("adapter", identity, "merge")
    name = None if job is None else MERGED.get(str(job.request.get("format")))
    if job is not None and name is not None and (path := service.supervisor.runs / job.id / name).is_file():
        for kind in ("folder", "job"):
            service.store.touch(kind, job.id)
        return FileResponse(path, media_type=BYTES, filename=f"merged-{identity}{path.suffix}")
    message = f"the run {identity} was not merged; ask for that at /v1/merges first"
    raise ServiceError(409, "conflict", message)


async def _metrics(request: Request, identity: str) -> Response:
    """Every step of a run so far."""
    service = service_of(request)
    job = run_of(service.store, identity)
    row = service.store.file("metrics", identity)
    if row is not None:
        lines = service.objects.read(row["digest"]).splitlines()
    else:
        live = service.supervisor.runs / identity / "out" / "metrics.jsonl"
        lines = (
            [line for line in live.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            if live.exists()
            else []
        )
    plan = service.store.file("plan", job.request["plan"])
    profile = None if plan is None else service.store.file("profile", plan["origin"])
    planned = (job.result or {}).get("report", {}) if plan is None else json.loads(plan["summary"])
    shape = {} if profile is None else json.loads(profile["summary"])
    records = [json.loads(line) for line in lines]
    metrics = RunMetrics(
        budget_bytes=planned.get("budget_bytes"),
        places_per_step=shape["batch"] * shape["seq"] if shape.get("seq") else None,
        steps=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "eval_loss" in record],
    )
    return Response(metrics.model_dump_json(), media_type=JSON)


PARTS: Mapping[str, Mapping[str, Part]] = {
    "plans": {"view": _view, "timeline": _timeline},
    "runs": {"metrics": _metrics, "report": _report, "adapter": _adapter, "merged": _merged},
    "uploads": {"file": _samples},
}
"""list of what is kept -> the parts of its items, beside `file` for what jobs leave"""
