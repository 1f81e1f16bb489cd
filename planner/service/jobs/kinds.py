"""The kinds of jobs: what asks for one, and how a request is checked before it becomes a job. What a job does then is
`jobs/work/KIND.py`, in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.planner.report.summary import unfinished_update
from tightfit.planner.schema import FITTING
from tightfit.planner.service.jobs.orders import LOCAL, SOLVE
from tightfit.planner.service.jobs.paths import confined
from tightfit.planner.service.jobs.store import JobStore, Row
from tightfit.planner.service.wire.bundles import check_config
from tightfit.planner.service.wire.errors import ServiceError, invalid, not_found
from tightfit.planner.service.wire.inputs import uploaded
from tightfit.planner.service.wire.requests import (
    AnswerPlanRequest,
    AnswerRequest,
    ComparisonRequest,
    MergeRequest,
    PlanRequest,
    PreviewRequest,
    ProfileRequest,
    RunRequest,
    TracingRequest,
)
from tightfit.planner.service.wire.schema import OWN_DEVICE, RequestBody, ServiceJob
from tightfit.planner.service.wire.settings import Settings
from tightfit.profiles.devices.data_sheets import known_devices
from tightfit.profiles.schema import MOBILLM
from tightfit.profiles.sources.file_header import model_of_header
from tightfit.profiles.weights.precision import precision
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import format_size
from tightfit.runtime.session.options import TrainingOptions

LEAST_TRACING_BYTES = 512 << 20
"""private memory of a process that traces a model: 352 MiB for two layers and 389 for thirty, PyTorch's own most of
it
"""
ALWAYS = {"seq", "batch", "lora_alpha", "accumulate", "dtype"}
"""fields of a request for a profile that always go to the worker; the others only if they are not at their defaults"""
RANK = 8
"""rank of the LoRA pairs, where a request names neither a rank nor an adapter"""
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A request that may become a job."""

    request: Row
    """what the worker gets"""
    uses: Sequence[tuple[str, str]] = ()
    """kind and id of the stored files that the job needs"""
    repeatable: bool = False
    """whether equal requests are jobs of their own"""
    renews: Row | None = None
    """the request whose answer is to be made anew: only a job that has not ended answers"""


Check = Callable[[JobStore, Settings, Any], Awaitable[Checked]]
"""Checks a request, of the record that its kind names. Raises ServiceError for what is refused. Its docstring is what
the API's description says of the kind.
"""


@dataclass(frozen=True)
class JobKind:
    address: str
    """under /v1/: where one is asked for"""
    summary: str
    request: type[RequestBody]
    check: Check
    lane: str = SOLVE
    """where jobs wait for their turn: those that measure or train need this machine's device to themselves"""
    kept: bool = False
    """whether the job leaves a file of this kind, which is listed, named, downloaded and deleted at the same address"""


# --- what can be asked for --------------------------------------------------------------------------------------------


async def check_profile(store: JobStore, settings: Settings, body: ProfileRequest) -> Checked:
    """Waits for this machine's device: measurements and runs follow each other.

    What was measured before is answered at once; `force` measures anew, and the new profile answers from then on.
    """
    _check_device(body.device, [LOCAL], "device")
    options = body.model_dump(include=ALWAYS)
    options |= body.model_dump(exclude={"path", "hub", "config", "header", "force"}, exclude_defaults=True)
    for name in ("adapter", "bundle"):
        if (path := getattr(body, name)) is not None:
            options[name] = await asyncio.to_thread(confined, path, settings.roots, name)
    if body.adapter is None and body.bundle is None:
        options["lora_rank"] = body.lora_rank or RANK
    request = options | await asyncio.to_thread(source_of, settings, body)
    return Checked(request=request | {"force": True}, renews=request) if body.force else Checked(request=request)


def source_of(settings: Settings, body: ProfileRequest) -> Row:
    """The model as a worker gets it: a path or hub id as `source`, or a `config`, of a header with its precision.
    Raises ServiceError 422.
    """
    if body.path is not None:
        return {"source": confined(body.path, settings.roots, "path")}
    if body.hub is not None:
        if not settings.hub:
            raise invalid("hub", "this service downloads nothing; start it with --hub, or name a path")
        return {"source": body.hub}
    if body.header is not None:
        try:
            config, base, embeddings = model_of_header(body.header, precision(body.base, body.embeddings))
        except InputError as error:
            raise invalid("header", str(error)) from error
        check_config(config, "header")
        return {"config": config, "base": base, "embeddings": embeddings}
    check_config(body.config, "config")
    return {"config": body.config}


async def check_tracing(store: JobStore, settings: Settings, body: TracingRequest) -> Checked:
    """The model's description is uploaded to `/v1/uploads/description` before. No weights and no data pass. Whatever
    the config names, no code is fetched or run: models are those of tightfit and those of the service's own
    transformers.
    """
    if settings.solve_bytes < LEAST_TRACING_BYTES:
        message = (
            f"a job of this service may take {format_size(settings.solve_bytes)}, and tracing takes"
            f" {format_size(LEAST_TRACING_BYTES)}; start it with --memory {LEAST_TRACING_BYTES >> 20}MiB or more, or"
            " copy the bundle that `tightfit prepare` makes on another machine"
        )
        raise ServiceError(422, "invalid_request", message)
    description = store.needed("description", body.description, "description")
    request = body.model_dump() | {"model": description["name"]}
    return Checked(request=request, uses=[("description", body.description)])


async def check_plan(store: JobStore, settings: Settings, body: PlanRequest) -> Checked:
    """A budget that is too small is a result with status infeasible and the smallest budget that is enough."""
    _check_time(body.time_limit, settings)
    _check_policy(body.policy, store.needed("profile", body.profile, "profile"), "policy")
    return Checked(request=body.model_dump(), uses=[("profile", body.profile)])


async def check_comparison(store: JobStore, settings: Settings, body: ComparisonRequest) -> Checked:
    """Budgets × policies × devices. Every cell's plan is kept."""
    _check_time(body.time_limit, settings)
    for index, device in enumerate(body.devices):
        _check_device(device, [OWN_DEVICE], f"devices.{index}")
    profile = store.needed("profile", body.profile, "profile")
    for index, policy in enumerate(body.policies):
        _check_policy(policy, profile, f"policies.{index}")
    each_once: Row = {
        "memory": sorted(set(body.memory)),
        "policies": list(dict.fromkeys(body.policies)),
        "devices": list(dict.fromkeys(body.devices)),
    }
    return Checked(request=body.model_dump() | each_once, uses=[("profile", body.profile)])


async def check_answer_plan(store: JobStore, settings: Settings, body: AnswerPlanRequest) -> Checked:
    """For a device that answers by itself: the job's `result.choices` say how many pieces of each kind are in each
    state; null: nothing fits.
    """
    return Checked(request=body.model_dump())


async def check_run(store: JobStore, settings: Settings, body: RunRequest) -> Checked:
    """Every request is a run of its own, unless an idempotency key says that it is the same one."""
    plan = store.needed("plan", body.plan, "plan")
    refusal = not_runnable(store, plan)
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
    for name, text in (("data", body.data), ("eval_data", body.eval_data), ("adapter", body.adapter)):
        if text is not None and text != real_paths[name]:
            real_paths[name] = await _data_path(store, settings, text, name)
    uses = [("plan", body.plan), *_model_of(store, plan["origin"]), *_uploads(body.data, body.eval_data)]
    return Checked(request=body.model_dump() | real_paths, uses=uses, repeatable=True)


async def check_preview(store: JobStore, settings: Settings, body: PreviewRequest) -> Checked:
    """The result has the first samples in pieces, learned or not, the lines that are refused, what is cut, and the
    share of padding.
    """
    _check_measured_here(store.needed("profile", body.profile, "profile"), "profile")
    request = body.model_dump() | {"data": await _data_path(store, settings, body.data, "data")}
    uploads = _uploads(body.data)
    # A file under a root may be another one tomorrow.
    return Checked(request=request, uses=[("profile", body.profile), *uploads], repeatable=not uploads)


async def check_answer(store: JobStore, settings: Settings, body: AnswerRequest) -> Checked:
    """Waits for this machine's device, as runs do. Progress has the text so far; every request is answered anew."""
    _check_measured_here(store.needed("profile", body.profile, "profile"), "profile")
    uses = _model_of(store, body.profile)
    if body.run is not None:
        file_of_run(store, body.run, "adapter")
        uses.append(("adapter", body.run))
    return Checked(request=body.model_dump(), uses=uses, repeatable=True)


async def check_merge(store: JobStore, settings: Settings, body: MergeRequest) -> Checked:
    """Waits for this machine's device; the merged model is at `/v1/runs/{identity}/merged` then. 409 where the run has
    left no adapter, or what it was planned from is gone.
    """
    file_of_run(store, body.run, "adapter")
    plan = store.file("plan", str(run_of(store, body.run).request.get("plan")))
    profile = None if plan is None else store.file("profile", plan["origin"])
    if profile is None:
        message = (
            f"the profile of the run {body.run} is gone, which says where its model lies; download the adapter and"
            " merge it there"
        )
        raise ServiceError(409, "conflict", message)
    request = body.model_dump() | {"profile": profile["id"]}
    return Checked(request=request, uses=[("adapter", body.run), ("profile", profile["id"])])


KINDS = {
    "profile": JobKind("profiles", "Measure a model on this machine", ProfileRequest, check_profile, LOCAL, kept=True),
    "bundle": JobKind(
        "bundles", "Trace a model for a device with little memory", TracingRequest, check_tracing, kept=True
    ),
    "plan": JobKind("plans", "Plan a profile at a budget", PlanRequest, check_plan, kept=True),
    "comparison": JobKind("comparisons", "Compare budgets, policies, devices", ComparisonRequest, check_comparison),
    "answer-plan": JobKind(
        "answer-plans", "Choose what stays in memory for answers", AnswerPlanRequest, check_answer_plan
    ),
    "preview": JobKind("previews", "Show data as a run would read them", PreviewRequest, check_preview),
    "run": JobKind("runs", "Carry out a plan", RunRequest, check_run, LOCAL),
    "answer": JobKind("answers", "Ask a model", AnswerRequest, check_answer, LOCAL),
    "merge": JobKind("merges", "Merge a run's adapter into its model", MergeRequest, check_merge, LOCAL),
}
"""what can be asked for: name of a kind -> where, and how it is checked; what it does is `jobs/work/NAME.py`"""


# --- what several requests are checked for ----------------------------------------------------------------------------


def run_of(store: JobStore, identity: str) -> ServiceJob:
    """Raises ServiceError 404."""
    job = store.job(identity)
    if job.kind != "run":
        raise not_found("run", identity)
    return job


def file_of_run(store: JobStore, identity: str, kind: str) -> Row:
    """What a run has left. Raises ServiceError 404, and 409 where it has left no such file."""
    job = run_of(store, identity)
    row = store.file(kind, identity)
    if row is None:
        raise ServiceError(409, "conflict", f"the run {identity} is {job.state} and has left no {kind}")
    return row


def not_runnable(store: JobStore, plan: Row) -> str | None:
    """Why a stored plan cannot be run on this machine; None where it can."""
    summary = json.loads(plan["summary"])
    if summary["status"] not in FITTING:
        return f"the plan {plan['id']} has no schedule ({summary['status']}); plan again with more memory"
    if summary["policy"] == MOBILLM:
        return (
            f"the plan {plan['id']} is a device's part of {MOBILLM}, and the server's has to run beside it; plan both"
            f" with `tightfit fleet plan --kind {MOBILLM}` and run the fleet: `tightfit fleet run`"
        )
    profile = store.file("profile", plan["origin"])
    if profile is not None and profile["origin"] == "example":
        return (
            f"this plan is of the example, which was measured on another machine; put {profile['name']} under a folder"
            " of the service, measure it there, plan and run that"
        )
    if profile is None or profile["origin"] != "made":
        # An uploaded profile's operators and paths are a stranger's: they are planned with, never executed.
        return (
            "this plan's profile was not made by this service; measure the model on the service's machine, plan and run"
            " that"
        )
    if summary.get("elsewhere"):
        return (
            f"the plan {plan['id']} is for {summary['elsewhere']} with estimated times; plan for this machine and run"
            " that"
        )
    return None


def _check_measured_here(profile: Row, field: str) -> None:
    """Raises ServiceError 422 where the model of a stored profile is not there to be used."""
    if profile["origin"] == "made":
        return
    message = (
        "this profile was not made by this service; measure the model on the service's machine, and ask with that"
        " profile"
    )
    if profile["origin"] == "example":
        message = (
            f"the example was measured on another machine; put {profile['name']} under a folder of the service, and"
            " measure it there"
        )
    raise invalid(field, message)


def _model_of(store: JobStore, identity: str) -> list[tuple[str, str]]:
    """What a job that uses the model of a profile needs: the profile and files of the cache, such as packed weights or
    a config that was sent. They are in use now.
    """
    profile = store.file("profile", identity)
    cached: list[str] = [] if profile is None else json.loads(profile["summary"]).get("cached", [])
    for name in cached:
        store.touch("cache", name)
    return [("profile", identity), *(("cache", name) for name in cached)]


def _uploads(*data: str | None) -> list[tuple[str, str]]:
    """The uploads among what is named as data."""
    return [("upload", identity) for text in data if (identity := uploaded(text)) is not None]


async def _data_path(store: JobStore, settings: Settings, data: str, field: str) -> str:
    """Data that a request names, as a worker gets them: an upload as it is named, a path in full.

    Raises ServiceError 422 for what lies outside the roots, and 404 for an upload that is not there.
    """
    identity = uploaded(data)
    if identity is None:
        return await asyncio.to_thread(confined, data, settings.roots, field)
    store.needed("upload", identity, field)
    return data


def _check_time(seconds: float, settings: Settings) -> None:
    """Raises ServiceError 422 for a time limit above the service's."""
    if seconds > settings.time_limit_seconds:
        limit = settings.time_limit_seconds
        raise invalid("time_limit", f"{seconds} s for one plan; this service allows at most {limit:g} s")


def _check_device(name: str, own: Sequence[str], field: str) -> None:
    """Raises ServiceError 422 for a device that is neither one of `own` nor one with a data sheet."""
    known = [*own, *(device.name for device in known_devices())]
    if name not in known:
        raise invalid(field, f"no device is called {name!r}; choose from {', '.join(known)}")


def _check_policy(policy: str, profile: Row, field: str) -> None:
    """Raises ServiceError 422 for a policy that a stored profile cannot be planned by."""
    summary = json.loads(profile["summary"])
    if policy in summary.get("refused", ()):
        raise invalid(field, summary["refused"][policy])
    known = [*summary["policies"], *summary.get("approximate", ())]
    if policy not in known:
        raise invalid(field, f"no policy is called {policy!r}; choose from {', '.join(known)}")
