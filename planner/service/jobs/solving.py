"""The jobs that make profiles, plans, comparisons and fleets; each returns its result and the files it made."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.planner.plan import policies_of
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.report.summary import fleet_summary, plan_summary, profile_summary
from tightfit.planner.schema import Plan
from tightfit.planner.service.jobs.cache import STORES, Cache
from tightfit.planner.service.jobs.store import Row, content_key, file_row
from tightfit.planner.service.wire.objects import Objects
from tightfit.planner.solve.policies import approximate_of, refused_of
from tightfit.profiles.io import canonical_json, parse_profile
from tightfit.profiles.schema import EXCHANGE, Profile
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.engine.training.job import passes_messages

if TYPE_CHECKING:
    from tightfit.planner.service.jobs.worker import JobOrder, Tell

SOLVER = "solver"
OWN = "own"
"""the device that the profile was made for"""


def plan(order: JobOrder, tell: Tell) -> Row:
    """One plan; one that does not fit is a result too."""
    from tightfit.planner.plan import planner_of
    from tightfit.planner.report.marginal_value import explained

    request = order.request
    objects = Objects(Path(order.objects))
    policy = None if request["policy"] == "solver" else request["policy"]
    limit = request["time_limit"]
    profiled = _profile(order, request["profile"])
    planner = planner_of(chosen(profiled, request.get("optimizer"), request.get("max_grad_norm")))
    began = time.monotonic()
    found = planner.plan(
        request["memory"],
        policy=policy,
        time_limit=limit,
        gap=request.get("gap", 0.0),
        progress=lambda told: tell.progress(**_finite(told)),
    )
    left = limit - (time.monotonic() - began)
    explanation = explained(planner, found, time_limit=limit, left=left).model_dump(mode="json")
    file = keep_plan(objects, order, found, request["profile"], explanation=explanation)
    summary = plan_summary(found) | {"explanation": explanation}
    return {"result": {"plan": file["id"], "summary": summary}, "files": [file]}


def comparison(order: JobOrder, tell: Tell) -> Row:
    """Plans of a profile at every budget by every policy on every device."""
    from tightfit.planner.report.compare import compare

    request = order.request
    objects = Objects(Path(order.objects))
    done = 0
    total = len(request["memory"]) * len(request["policies"]) * len(request["devices"])

    def planned(made: Plan) -> None:
        nonlocal done
        done += 1
        figures = (
            "status",
            "budget_bytes",
            "policy",
            "peak_bytes",
            "step_seconds",
            "bound_seconds",
            "ended_by",
            "minimum_budget_bytes",
        )
        cell: Row = {"device": made.device.name} | {name: getattr(made, name) for name in figures}
        tell.progress(always=True, stage="planning", done=done, total=total, cell=cell)

    found = compare(
        _profile(order, request["profile"]),
        request["memory"],
        request["policies"],
        devices=[None if name == OWN else name for name in request["devices"]],
        time_limit=request["time_limit"],
        gap=request.get("gap", 0.0),
        optimizer=request.get("optimizer"),
        max_grad_norm=request.get("max_grad_norm"),
        planned=planned,
        solving=lambda told: tell.progress(**_finite(told), done=done, total=total),
    )
    files = [keep_plan(objects, order, one, request["profile"]) for one in found.plans]
    cells = [
        {
            "device": one.device.name,
            "budget_bytes": one.budget_bytes,
            "policy": one.policy,
            "plan": file["id"],
            "summary": plan_summary(one),
        }
        for one, file in zip(found.plans, files, strict=True)
    ]
    return {"result": {"cells": cells}, "files": files}


def fleet(order: JobOrder, tell: Tell) -> Row:
    """The plan of a fleet and those of its members, which are stored like any other plans."""
    from tightfit.planner.fleet.kinds import plan_kind
    from tightfit.planner.fleet.plan import MemberSpec
    from tightfit.planner.fleet.schema import Link

    request = order.request
    objects = Objects(Path(order.objects))
    origins = {member["name"]: member["profile"] for member in request["members"]}
    profiles = {identity: _profile(order, identity) for identity in set(origins.values())}
    members = [
        MemberSpec(
            name=member["name"],
            profile=profiles[member["profile"]],
            budget_bytes=member["memory"],
            link=Link(
                up_bytes_per_second=member["up"],
                down_bytes_per_second=member["down"],
                latency_seconds=member["latency"],
            ),
        )
        for member in request["members"]
    ]
    found, plans, why = plan_kind(
        members,
        request["micro_batches"],
        kind=request["kind"],
        bits=request["bits"],
        time_limit=request["time_limit"],
        gap=request["gap"],
        prices=request["prices"],
        progress=lambda told: tell.progress(**_finite(told)),
    )
    written = objects.put(found.model_dump_json().encode())
    summary = fleet_summary(found)
    files = [keep_plan(objects, order, made, origins[name]) for name, made in plans.items()]
    ids = {name: file["id"] for name, file in zip(plans, files, strict=True)}
    identity = _identity(order, found.fingerprint)
    files.append(file_row("fleet", identity, written, name=found.model, summary=summary | {"plans": ids}))
    return {"result": {"fleet": identity, "plans": ids, "why": why, "summary": summary}, "files": files}


def profile(order: JobOrder, tell: Tell) -> Row:
    """Measure a model on this machine, alone on its device."""
    import fcntl

    from tightfit.profiles.api import profile as measure
    from tightfit.profiles.sources.lookup import resolve
    from tightfit.runtime.engine.weights.layout import store_path

    assert order.lock is not None
    objects, cache = Objects(Path(order.objects)), Cache(cache_directory())
    request = dict(order.request)
    with Path(order.lock).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if "config" in request:
            request["source"] = str(cache.keep_config(request.pop("config")))
        named = request.pop("source")
        found = measure(
            named, **request, progress=lambda stage, done, total: tell.progress(stage=stage, done=done, total=total)
        )
    # A model without weights has a store as soon as one of its plans runs.
    source = resolve(named, base=found.model.base, embeddings=found.model.embeddings)
    store = found.model.store or str(store_path(cache.folder / STORES, source.name, source.fingerprint))
    cached = [name for name in map(cache.name, (store, found.model.source)) if name is not None]
    model, paths = order.redaction().model(found.model)
    found = found.model_copy(update={"model": model})
    file = keep_profile(objects, found, origin="made", cached=cached, paths=paths)
    return {
        "result": {"profile": file["id"], "summary": profile_summary(found)},
        "files": [file, *cache.rows(cached)],
    }


def _finite(told: Mapping[str, float | str]) -> Row:
    """JSON has no infinity: 0 means that there is none yet."""
    return {k: 0.0 if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}


def _profile(order: JobOrder, identity: str) -> Profile:
    return parse_profile(order.content(identity), f"the stored profile {identity}")


def keep_profile(
    objects: Objects, found: Profile, *, origin: str, cached: Sequence[str] = (), paths: Row | None = None
) -> Row:
    """Store a profile under its checksum. `origin` is made (on this machine, by this service) or uploaded; `cached` are
    the files of the cache that a run of its plans reads, `paths` what `Redaction.model` took out of it.
    """
    written = objects.put(canonical_json(found).encode())
    # Policies that follow another gradient are planned only where a request names them, and not compared with the
    # others by default.
    policies = {"policies": [SOLVER, *policies_of(found)], "approximate": list(approximate_of(found))}
    summary = profile_summary(found) | policies | {"refused": refused_of(found), "cached": list(cached)}
    return file_row(
        "profile", written.digest, written, name=found.model.name, origin=origin, summary=summary, paths=paths
    )


def _identity(order: JobOrder, fingerprint: str) -> str:
    """What a plan of that fingerprint was made of: the contents of its profiles, which are their ids, and all that was
    asked. Another profile may lead to the same plan, and only what was measured here is run.
    """
    return hashlib.sha256(f"{content_key(order.kind, order.request)} {fingerprint}".encode()).hexdigest()


def _elsewhere(plan: Plan) -> str | None:
    """The device that a plan is for, where that is not one on which plans are run."""
    return None if plan.device.measured and plan.device.kind == "cpu" else plan.device.name


def keep_plan(objects: Objects, order: JobOrder, found: Plan, origin: str, explanation: Row | None = None) -> Row:
    """Store a plan of the profile `origin` under what it was made of."""
    written = objects.put(found.model_dump_json().encode())
    name = f"{found.model.name}, {found.policy}"
    marks = {
        "elsewhere": _elsewhere(found),
        "of_a_fleet": found.optimizer.get("name") == EXCHANGE or passes_messages(found.programs),
    }
    summary: Row = plan_summary(found) | {"explanation": explanation} | marks
    return file_row("plan", _identity(order, found.fingerprint), written, name=name, origin=origin, summary=summary)
