"""The plans of the smallest budgets that were ever found, kept in the cache by profile and policy: a later call, in
this process or another, knows them, and never says of a budget that nothing fits where something does.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from tightfit.planner.io import parse_plan
from tightfit.planner.schema import Plan
from tightfit.profiles.learned import figures_id
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.cache import cache_place, keep, kept
from tightfit.runtime.common.errors import TightfitError


def smallest_known(profile: Profile, policy: str) -> Plan | None:
    """The plan of the lowest peak that was found for a profile under a policy; None: none is known."""
    plan = kept(_place(profile, policy), partial(parse_plan, origin="a kept plan"))
    return plan if plan is not None and plan.profile_fingerprint == profile.fingerprint else None


def remember_smallest(profile: Profile, plan: Plan) -> None:
    """Keep a plan, if none of a lower peak is known. A cache that cannot be written is no error."""
    known = smallest_known(profile, plan.policy)
    if known is None or known.peak_bytes > plan.peak_bytes:
        with suppress(TightfitError):
            keep(_place(profile, plan.policy), plan.model_dump_json())


def _place(profile: Profile, policy: str) -> Path:
    return cache_place("smallest", figures_id(profile), profile.optimizer, policy)
