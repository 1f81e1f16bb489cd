"""Reads and writes plan files: versioned JSON with a fingerprint of its content, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tightfit.planner.plan_result import fingerprint
from tightfit.planner.schema import PLAN_VERSION, Plan
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import of_another_version, read_whole, write_whole
from tightfit.runtime.common.strict_json import JsonError, from_json

AGAIN = "make it again with `tightfit plan`"
M = TypeVar("M", bound=BaseModel)


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write `plan` to `path`. Raises InputError where it cannot be written there, RunError where the disk is full."""
    return write_whole(path, plan.model_dump_json())


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in `path`, checked against its fingerprint.

    Raises InputError for a file that is missing, cut off, changed, of another version or no plan at all.
    """
    path = Path(path)
    try:
        data = read_whole(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such plan; make one with `tightfit plan profile.json --memory SIZE`") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a plan file") from error
    return parse_plan(data, str(path))


def parse_plan(data: bytes, origin: str) -> Plan:
    """The plan that `data` holds, checked against its fingerprint; `origin` says where they come from.

    Raises InputError for data that are cut off, changed, of another version or no plan at all.
    """
    content = whole_json(data, origin, AGAIN)
    if not isinstance(content, dict) or "version" not in content or "budget_bytes" not in content:
        kind = "a profile" if isinstance(content, dict) and "programs" in content else "something else"
        if isinstance(content, dict) and "members" in content:
            fleet_kind = str(content.get("kind"))
            raise InputError(
                f"{origin}: the plan of a fleet ({fleet_kind}), not of one device; `{fleet_command(fleet_kind)}"
                f" {origin} ...` runs it"
            )
        raise InputError(f"{origin}: {kind}, not a plan; {AGAIN}")
    if content["version"] != PLAN_VERSION:
        raise InputError(f"{origin}: {of_another_version('plan', content['version'], PLAN_VERSION)}; {AGAIN}")
    del content  # so that it does not take memory beside the plan itself
    plan = validated(Plan, data, origin, AGAIN)
    check_unchanged(fingerprint(plan), plan.fingerprint, origin, AGAIN)
    return plan


def fleet_command(kind: str) -> str:
    """The command that runs the plan of a fleet of this kind."""
    return "tightfit fleet federate run" if kind.endswith("federated") else "tightfit fleet run"


def whole_json(data: bytes, origin: str, advice: str) -> Any:
    """What the JSON in `data` says. Raises InputError, which ends with `advice`, where it is not whole."""
    try:
        return from_json(data)
    except JsonError as error:
        raise InputError(f"{origin}: not whole JSON ({error}), perhaps cut off or damaged; {advice}") from error


def validated(schema: type[M], data: bytes, origin: str, advice: str) -> M:
    """The record that the JSON in `data` holds. Raises InputError, which names the first wrong field, otherwise."""
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise InputError(f"{origin}: field {field}: {fault['msg']}; {advice}") from error


def check_unchanged(computed: str, stated: str, origin: str, advice: str) -> None:
    """Raise InputError where the fingerprint `computed` from a file's content is not the one `stated` in it."""
    if computed != stated:
        raise InputError(
            f"{origin}: its content does not match its fingerprint {stated[:12]}…: changed or damaged; {advice}"
        )
