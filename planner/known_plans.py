"""The plans of the smallest budgets that were ever found, kept in the cache by profile and policy: a later call, in
this process or another, knows them, and never says of a budget that nothing fits where something does.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from tightfit.planner.io import load_plan, save_plan
from tightfit.planner.schema import Plan
from tightfit.profiles.learned import figures_id
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.files import cache_directory

MOST_KEPT = 64
"""plans; of more the ones used longest ago are removed"""


def smallest_known(profile: Profile, policy: str) -> Plan | None:
    """The plan of the lowest peak that was found for a profile under a policy; None: none is known."""
    path = _place(profile, policy)
    if not path.exists():
        return None
    try:
        plan = load_plan(path)
    except TightfitError:  # of another version, or damaged
        return None
    with suppress(OSError):
        path.touch()
    return plan if plan.profile_fingerprint == profile.fingerprint else None


def remember_smallest(profile: Profile, plan: Plan) -> None:
    """Keep a plan, if none of a lower peak is known. A cache that cannot be written is no error."""
    known = smallest_known(profile, plan.policy)
    if known is not None and known.peak_bytes <= plan.peak_bytes:
        return
    path = _place(profile, plan.policy)
    with suppress(TightfitError, OSError):
        save_plan(plan, path)
        stored = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in stored[:-MOST_KEPT]:
            old.unlink(missing_ok=True)


def _place(profile: Profile, policy: str) -> Path:
    key = json.dumps([figures_id(profile), profile.optimizer, policy], sort_keys=True)
    return cache_directory() / "smallest" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
