"""The jobs that work out something: profiles, plans, comparisons. Each returns its result and the files it made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.schema import Plan
from planner.service.objects import Objects
from planner.service.store import file_row
from planner.summary import plan_summary, profile_summary
from profiles.exchange import canonical_json, parse_profile
from profiles.schema import Profile

if TYPE_CHECKING:
    from planner.service.worker import Order, Tell

Row = dict[str, Any]


def plan(order: Order, tell: Tell) -> Row:
    """One plan; one that does not fit is a result too."""
    from planner.plan import plan as solve

    request = order.request
    objects = Objects(Path(order.objects))

    def progress(told: Mapping[str, float | str]) -> None:
        # JSON has no infinity: 0 means that there is none yet.
        tell.progress(**{k: 0.0 if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()})

    found = solve(
        _profile(objects, order, request["profile"]),
        request["memory"],
        policy=None if request["policy"] == "solver" else request["policy"],
        time_limit=request["time_limit"],
        progress=progress,
    )
    file = keep_plan(objects, found, request["profile"])
    return {"result": {"plan": found.fingerprint, "summary": plan_summary(found)}, "files": [file]}


def comparison(order: Order, tell: Tell) -> Row:
    """Plans of every profile at every budget by every policy."""
    from planner.compare import compare

    request = order.request
    objects = Objects(Path(order.objects))
    cells: list[Row] = []
    files: dict[str, Row] = {}
    each = len(request["memory"]) * len(request["policies"])
    for index, identity in enumerate(request["profiles"]):

        def progress(stage: str, done: int, total: int, before: int = index * each) -> None:
            tell.progress(always=True, stage=stage, done=before + done, total=each * len(request["profiles"]))

        found = compare(
            _profile(objects, order, identity),
            request["memory"],
            request["policies"],
            time_limit=request["time_limit"],
            progress=progress,
        )
        for one in found.plans:
            files[one.fingerprint] = keep_plan(objects, one, identity)
            cells.append(
                {
                    "profile": identity,
                    "budget_bytes": one.budget_bytes,
                    "policy": one.policy,
                    "plan": one.fingerprint,
                    "summary": plan_summary(one),
                }
            )
    return {"result": {"cells": cells}, "files": list(files.values())}


def profile(order: Order, tell: Tell) -> Row:
    """Measure a model on this machine, alone on its device."""
    import fcntl

    from profiles.api import profile as measure

    assert order.lock is not None
    objects = Objects(Path(order.objects))
    with Path(order.lock).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = measure(
            **order.request, progress=lambda stage, done, total: tell.progress(stage=stage, done=done, total=total)
        )
    file = keep_profile(objects, found, origin="made")
    return {"result": {"profile": file["id"], "summary": profile_summary(found)}, "files": [file]}


def _profile(objects: Objects, order: Order, identity: str) -> Profile:
    return parse_profile(objects.read(order.digests[identity]), "the stored profile")


def keep_profile(objects: Objects, found: Profile, *, origin: str) -> Row:
    """Store a profile under its checksum. `origin` is made (on this machine, by this service) or uploaded."""
    written = objects.put(canonical_json(found).encode())
    return file_row(
        "profile", written.digest, written, name=found.model.name, origin=origin, summary=profile_summary(found)
    )


def keep_plan(objects: Objects, found: Plan, origin: str) -> Row:
    """Store a plan under its fingerprint."""
    written = objects.put(found.model_dump_json().encode())
    name = f"{found.model.name}, {found.policy}"
    summary: Row = plan_summary(found)
    return file_row("plan", found.fingerprint, written, name=name, origin=origin, summary=summary)
