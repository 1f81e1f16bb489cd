"""``/v1/runs``: plans carried out on this machine's device, one after the other."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse

from tightfit.planner.report.summary import unfinished_update
from tightfit.planner.service.http.guard import BYTES
from tightfit.planner.service.http.routes_common import (
    JOB_RESPONSES,
    IdempotencyKey,
    cached_of,
    data_path,
    described_file,
    enqueue,
    errors,
    file_of_run,
    file_response,
    job_response,
    not_runnable,
    run_of,
    service_of,
    stored,
)
from tightfit.planner.service.jobs.orders import MERGED
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.wire.errors import ServiceError, invalid
from tightfit.planner.service.wire.inputs import uploaded
from tightfit.planner.service.wire.requests import MergeRequest, RunRequest
from tightfit.planner.service.wire.schema import JobId, RunMetrics, ServiceJob
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.session.options import TrainingOptions

router = APIRouter(prefix="/v1/runs", tags=["runs"])
Identity = Annotated[JobId, Path(description="the run's job")]
REPORT = described_file(
    "report.json as `tightfit run` writes it",
    {"peak_bytes": {"predicted": 365217587, "measured": 363646976}, "loss": [3.2, 2.9]},
    409,
)
ADAPTER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A tar file of the folder adapter/",
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    },
    **errors(404, 409),
}
MERGED_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A GGUF file, or a tar file of the folder merged/",
        "content": {BYTES: {"schema": {"type": "string", "format": "binary"}}},
    },
    **errors(404, 409),
}
RANDOM = "random"


@router.post("", status_code=202, responses=JOB_RESPONSES, summary="Carry out a plan")
async def make_run(request: Request, body: RunRequest, key: IdempotencyKey = None) -> Response:
    """Every request is a run of its own, unless an idempotency key says that it is the same one."""
    job_request = body.model_dump() | await _allowed(request, body)
    profile = stored(request, "plan", body.plan)["origin"]
    uses = [("plan", body.plan), ("profile", profile), *(("cache", name) for name in cached_of(request, profile))]
    uses += [("upload", identity) for data in (body.data, body.eval_data) if (identity := uploaded(data)) is not None]
    return enqueue(request, "run", job_request, key=key, uses=uses, repeatable=True)


@router.post(
    "/{identity}/resume",
    status_code=202,
    response_model=ServiceJob,
    responses=errors(404, 409, 429),
    summary="Go on with a run",
)
async def resume_run(request: Request, identity: Identity, key: IdempotencyKey = None) -> Response:
    """A run that was cancelled, failed or interrupted goes on from its checkpoint. 409 where it has not ended so.

    What it reads is allowed or refused as for a new run: the service may have been started with other roots since.
    """
    await _allowed(request, RunRequest(**run_of(request, identity).request))
    return job_response(service_of(request).supervisor.resume(identity, key))


@router.get("/{identity}/metrics", response_model=RunMetrics, responses=errors(404), summary="Every step so far")
async def get_metrics(request: Request, identity: Identity) -> RunMetrics:
    service = service_of(request)
    job = run_of(request, identity)
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
    return RunMetrics(
        budget_bytes=planned.get("budget_bytes"),
        places_per_step=shape["batch"] * shape["seq"] if shape.get("seq") else None,
        steps=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "eval_loss" in record],
    )


@router.get("/{identity}/report", responses=REPORT, summary="Predicted beside measured", response_class=Response)
async def get_report(request: Request, identity: Identity) -> Response:
    return await file_response(request, file_of_run(request, identity, "report"))


@router.get("/{identity}/adapter", responses=ADAPTER, summary="The adapter as a tar file", response_class=Response)
async def get_adapter(request: Request, identity: Identity) -> Response:
    """`adapter/` as `peft.PeftModel.from_pretrained` takes it."""
    row = file_of_run(request, identity, "adapter")
    return await file_response(request, row, media_type="application/x-tar", name=f"adapter-{identity}.tar")


@router.post("/{identity}/merge", status_code=202, responses=JOB_RESPONSES, summary="Merge a run's adapter")
async def merge_run(request: Request, identity: Identity, body: MergeRequest, key: IdempotencyKey = None) -> Response:
    """Waits for this machine's device. 409 where the run has left no adapter, or what it was planned from is gone."""
    file_of_run(request, identity, "adapter")
    plan = service_of(request).store.file("plan", str(run_of(request, identity).request.get("plan")))
    profile = None if plan is None else service_of(request).store.file("profile", plan["origin"])
    if profile is None:
        message = (
            f"the profile of the run {identity} is gone, which says where its model lies; download the adapter and"
            " merge it there"
        )
        raise ServiceError(409, "conflict", message)
    job_request = {"run": identity, "profile": profile["id"], "format": body.format}
    uses = [("adapter", identity), ("profile", profile["id"])]
    return enqueue(request, "merge", job_request, key=key, uses=uses)


@router.get("/{identity}/merged", responses=MERGED_FILE, summary="The merged model", response_class=FileResponse)
async def get_merged(request: Request, identity: Identity) -> FileResponse:
    """What was merged last: a GGUF file, or a tar file of the folder merged/ with safetensors. 409 before it was
    merged.
    """
    service = service_of(request)
    run_of(request, identity)
    job = service.store.job_using("adapter", identity, "merge")
    name = None if job is None else MERGED.get(str(job.request.get("format")))
    if job is not None and name is not None and (path := service.supervisor.runs / job.id / name).is_file():
        for kind in ("folder", "job"):
            service.store.touch(kind, job.id)
        return FileResponse(path, media_type=BYTES, filename=f"merged-{identity}{path.suffix}")
    raise ServiceError(409, "conflict", f"the run {identity} was not merged; post to /v1/runs/{identity}/merge first")


async def _allowed(request: Request, body: RunRequest) -> Row:
    """The real paths that a run reads. Raises ServiceError for what may not be run here, or lies outside the roots."""
    plan = stored(request, "plan", body.plan, "plan")
    refusal = not_runnable(request, plan)
    if refusal is not None:
        raise invalid("plan", refusal)
    if body.steps is None and body.epochs is None:
        raise invalid("steps", "the number of steps is missing: give it, or epochs")
    if body.steps is not None:
        unfinished = unfinished_update(body.steps, json.loads(plan["summary"]).get("accumulate", 1))
        if unfinished is not None:
            raise invalid("steps", unfinished)
    try:
        TrainingOptions.of(body.model_dump())
    except InputError as error:
        raise invalid(str(error).split()[0].rstrip(":"), str(error)) from error  # it begins with the option's name
    if body.eval_every is not None and body.eval_data is None:
        raise invalid("eval_every", "there is nothing to evaluate on; give eval_data")
    real_paths: Row = {"data": RANDOM, "eval_data": None, "adapter": None}
    for field, text in (("data", body.data), ("eval_data", body.eval_data), ("adapter", body.adapter)):
        if text is not None and text != real_paths[field]:
            real_paths[field] = await data_path(request, text, field)
    return real_paths
