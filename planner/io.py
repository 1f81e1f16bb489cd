"""Reads and writes plan files: versioned JSON with a fingerprint of its content, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError

from tightfit.planner.plan_result import fingerprint
from tightfit.planner.schema import PLAN_VERSION, Plan
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import of_another_version, write_whole

AGAIN = "make it again with `tightfit plan`"


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write `plan` to `path`. Raises InputError where it cannot be written there, RunError where the disk is full."""
    return write_whole(path, plan.model_dump_json())


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in `path`, checked against its fingerprint.

    Raises InputError for a file that is missing, cut off, changed, of another version or no plan at all.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such plan; make one with `tightfit plan profile.json --memory SIZE`") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a plan file") from error
    return parse_plan(data, str(path))


def parse_plan(data: bytes, place: str) -> Plan:
    """The plan that `data` holds, checked against its fingerprint; `place` is where it comes from.

    Raises InputError for data that are cut off, changed, of another version or no plan at all.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not whole JSON ({error}), perhaps cut off or damaged; {AGAIN}") from error
    if not isinstance(content, dict) or "version" not in content or "budget_bytes" not in content:
        kind = "a profile" if isinstance(content, dict) and "programs" in content else "something else"
        raise InputError(f"{place}: {kind}, not a plan; {AGAIN}")
    if content["version"] != PLAN_VERSION:
        raise InputError(f"{place}: {of_another_version('plan', content['version'], PLAN_VERSION)}; {AGAIN}")
    del content  # so that it does not take memory beside the plan itself
    try:
        plan = Plan.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{place}: field {where}: {first['msg']}; {AGAIN}") from error
    if fingerprint(plan) != plan.fingerprint:
        raise InputError(
            f"{place}: its content does not match its fingerprint {plan.fingerprint[:12]}…: changed or damaged; {AGAIN}"
        )
    return plan
