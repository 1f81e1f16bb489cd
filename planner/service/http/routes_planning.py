"""``/v1/plans``, ``/v1/comparisons`` and ``/v1/answer-plans``: will it fit, how fast, and what another budget, rule or
device would change.
"""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from tightfit.planner.service.http.routes_common import (
    JOB_RESPONSES,
    After,
    IdempotencyKey,
    Limit,
    Search,
    check_device,
    check_time,
    described_file,
    enqueue,
    errors,
    file_response,
    named,
    not_runnable,
    service_of,
    stored,
)
from tightfit.planner.service.jobs.store import Row, listed
from tightfit.planner.service.wire.errors import ServiceError, invalid
from tightfit.planner.service.wire.requests import (
    AnswerPlanRequest,
    ComparisonRequest,
    NameRequest,
    PlanRequest,
)
from tightfit.planner.service.wire.schema import OWN_DEVICE, Digest, PlanList, StoredPlan

router = APIRouter(prefix="/v1", tags=["planning"])
Identity = Annotated[Digest, Path(description="of what the plan was made of")]
Asked = Annotated[
    bool,
    Query(
        description=(
            "only plans that somebody named, used or asked for, not those made for a comparison alone or to learn of"
            " the smallest budget"
        )
    ),
]
FILE = described_file("plan.json as `tightfit plan` writes it", {"status": "optimal", "peak_bytes": 366897152})
VIEW = described_file(
    "Words, figures, what fills the peak, layers and channels; without a schedule no more than words and figures",
    {"model": "SmolLM2-135M", "plain": ["It does not fit 100.0 MiB: the smallest budget that is enough is 191.3 MiB."]},
)
TIMELINE = described_file(
    "Columns with an entry for each instruction, tensor or transfer, as `tightfit.planner.report.step_columns` makes"
    " them",
    {"seconds": 2.5, "tick": 1e-8, "instructions": {"what": [0], "of": [0], "wait": [0], "work": [250000000]}},
    409,
)
CHANGES = described_file(
    "Both plans in figures, changes by sort, and tensor by tensor, the largest first",
    {"groups": [{"kind": "activation", "before": "recomputed", "after": "kept", "tensors": 30}], "left_out": 0},
)


@router.post("/plans", status_code=202, responses=JOB_RESPONSES, summary="Plan a profile at a budget")
async def make_plan(request: Request, body: PlanRequest, key: IdempotencyKey = None) -> Response:
    """A budget that is too small is a result with status infeasible and the smallest budget that is enough."""
    settings = service_of(request).settings
    check_time(body.time_limit, settings)
    _check_policy(body.policy, stored(request, "profile", body.profile, "profile"), "policy")
    return enqueue(request, "plan", body.model_dump(), key=key, uses=[("profile", body.profile)])


@router.get("/plans", response_model=PlanList, summary="Plans, newest first")
async def list_plans(
    request: Request,
    profile: Digest | None = None,
    asked: Asked = False,
    limit: Limit = 100,
    after: After = None,
    search: Search = None,
) -> PlanList:
    store = service_of(request).store
    rows = store.files("plan", origin=profile, asked=asked, search=search, after=after, limit=limit)
    return PlanList(plans=[listed(row) for row in rows.items], next=rows.next, set_aside=store.set_aside("plan"))


@router.get("/plans/{identity}", response_model=StoredPlan, responses=errors(404), summary="A plan in figures")
async def get_plan(request: Request, identity: Identity) -> StoredPlan:
    plan: StoredPlan = listed(stored(request, "plan", identity))
    return plan


@router.patch(
    "/plans/{identity}",
    response_model=StoredPlan,
    responses=errors(400, 404, 408, 413, 415),
    summary="Call a plan by a name",
)
async def name_plan(request: Request, identity: Identity, body: NameRequest) -> StoredPlan:
    plan: StoredPlan = named(request, "plan", identity, body)
    return plan


@router.delete("/plans/{identity}", status_code=204, responses=errors(404, 409), summary="Delete a plan")
async def delete_plan(request: Request, identity: Identity) -> None:
    """Its runs stay. 409 while a job needs it."""
    service_of(request).supervisor.delete_file("plan", identity)


@router.get("/plans/{identity}/file", responses=FILE, summary="The whole plan", response_class=Response)
async def get_plan_file(request: Request, identity: Identity) -> Response:
    """What `tightfit run` takes."""
    return await file_response(request, stored(request, "plan", identity))


@router.get(
    "/plans/{identity}/view", responses=VIEW, summary="A plan to look at, as the page shows it", response_class=Response
)
async def get_plan_view(request: Request, identity: Identity) -> Response:
    """Sentences, memory over the step, what fills the peak, layers with their decisions, channels: what the page
    shows.
    """
    row = stored(request, "plan", identity)
    views = service_of(request).views
    return await views.answer(request, "plan", [row], not_runnable=not_runnable(request, row))


@router.get(
    "/plans/{identity}/timeline",
    responses=TIMELINE,
    summary="A plan's step, instruction by instruction",
    response_class=Response,
)
async def get_plan_timeline(request: Request, identity: Identity) -> Response:
    """When the cores and the channels do what, which tensors are in memory then, and why each is as it is. 409 where
    nothing fits.
    """
    row = stored(request, "plan", identity)
    if json.loads(row["summary"])["status"] == "infeasible":
        raise ServiceError(409, "conflict", f"the plan {identity} has no schedule: its budget is too small")
    return await service_of(request).views.answer(request, "timeline", [row])


@router.get(
    "/plans/{identity}/changes/{other}",
    responses=CHANGES,
    summary="What another plan does otherwise",
    response_class=Response,
)
async def get_changes(request: Request, identity: Identity, other: Digest) -> Response:
    """Tensor by tensor: kept, recomputed, offloaded, streamed, packed, unpacked in this plan and in the other."""
    rows = [stored(request, "plan", name) for name in (identity, other)]
    return await service_of(request).views.answer(request, "changes", rows)


@router.post("/comparisons", status_code=202, responses=JOB_RESPONSES, summary="Compare budgets, policies, devices")
async def make_comparison(request: Request, body: ComparisonRequest, key: IdempotencyKey = None) -> Response:
    """Budgets × policies × devices. Every cell's plan is kept."""
    settings = service_of(request).settings
    check_time(body.time_limit, settings)
    for index, device in enumerate(body.devices):
        check_device(device, [OWN_DEVICE], f"devices.{index}")
    row = stored(request, "profile", body.profile, "profile")
    for index, policy in enumerate(body.policies):
        _check_policy(policy, row, f"policies.{index}")
    return enqueue(request, "comparison", comparison_request(body), key=key, uses=[("profile", body.profile)])


def comparison_request(body: ComparisonRequest) -> Row:
    """What a worker gets of a request for a comparison: each budget, policy and device once."""
    job_request: Row = body.model_dump() | {
        "memory": sorted(set(body.memory)),
        "policies": list(dict.fromkeys(body.policies)),
        "devices": list(dict.fromkeys(body.devices)),
    }
    return job_request


@router.post(
    "/answer-plans", status_code=202, responses=JOB_RESPONSES, summary="Choose what stays in memory for answers"
)
async def choose_for_answers(request: Request, body: AnswerPlanRequest, key: IdempotencyKey = None) -> Response:
    """For a device that answers by itself: the job's `result.choices` say how many pieces of each kind are in each
    state; null: nothing fits.
    """
    return enqueue(request, "answer-plan", body.model_dump(), key=key)


def _check_policy(policy: str, profile: Row, field: str) -> None:
    summary = json.loads(profile["summary"])
    if policy in summary.get("refused", ()):
        raise invalid(field, summary["refused"][policy])
    known = [*summary["policies"], *summary.get("approximate", ())]
    if policy not in known:
        raise invalid(field, f"no policy is called {policy!r}; choose from {', '.join(known)}")
