"""Stores profiles and plans: each as an object, with the row that the store keeps of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tightfit.planner.plan import policies_of
from tightfit.planner.report.summary import plan_summary, profile_summary
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import SOLVER
from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.jobs.store import Row, content_key, file_row
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.solve.policies import approximate_of, refused_of
from tightfit.profiles.io import canonical_json
from tightfit.profiles.schema import Profile


def keep_profile(
    objects: ObjectStore,
    profile: Profile,
    *,
    origin: str,
    cached: Sequence[str] = (),
    paths: Row | None = None,
    request: Row | None = None,
) -> Row:
    """Store a profile under its checksum. `origin` is made (on this machine, by this service), uploaded or example;
    `cached` are the files of the cache that a run of its plans reads, `paths` what `Redaction.model` took out of it,
    `request` what it was measured by.
    """
    written = objects.put(canonical_json(profile).encode())
    # Policies that follow another gradient are planned only where a request names them, and not compared with the
    # others by default.
    policies = {"policies": [SOLVER, *policies_of(profile)], "approximate": list(approximate_of(profile))}
    summary = profile_summary(profile) | policies | {"refused": refused_of(profile), "cached": list(cached)}
    summary |= {"request": request}
    return file_row(
        "profile", written.digest, written, name=profile.model.name, origin=origin, summary=summary, paths=paths
    )


def keep_plan(
    objects: ObjectStore,
    order: JobOrder,
    plan: Plan,
    origin: str,
    explanation: Row | None = None,
) -> Row:
    """Store a plan of the profile `origin` under what it was made of."""
    written = objects.put(plan.model_dump_json().encode())
    # the device that it is for, where that is not one on which plans are run
    elsewhere = None if plan.device.measured and plan.device.kind == "cpu" else plan.device.name
    summary: Row = plan_summary(plan) | {"explanation": explanation, "elsewhere": elsewhere}
    name = f"{plan.model.name}, {plan.policy}"
    return file_row("plan", identity_of(order, plan.fingerprint), written, name=name, origin=origin, summary=summary)


def identity_of(order: JobOrder, fingerprint: str) -> str:
    """What a plan of that fingerprint was made of: the contents of its profiles, which are their ids, and all that was
    asked. Another profile may lead to the same plan, and only what was measured here is run.
    """
    return hashlib.sha256(f"{content_key(order.kind, order.request)} {fingerprint}".encode()).hexdigest()
