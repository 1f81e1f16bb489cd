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


def parse_plan(data: bytes, place: str) -> Plan:
    """The plan that `data` holds, checked against its fingerprint; `place` is where it comes from.

    Raises InputError for data that are cut off, changed, of another version or no plan at all.
    """
    content = whole_json(data, place, AGAIN)
    if not isinstance(content, dict) or "version" not in content or "budget_bytes" not in content:
        kind = "a profile" if isinstance(content, dict) and "programs" in content else "something else"
        if isinstance(content, dict) and "members" in content:
            found = str(content.get("kind"))
            raise InputError(
                f"{place}: the plan of a fleet ({found}), not of one device; `{fleet_command(found)} {place} ...` runs it"
            )
        raise InputError(f"{place}: {kind}, not a plan; {AGAIN}")
    if content["version"] != PLAN_VERSION:
        raise InputError(f"{place}: {of_another_version('plan', content['version'], PLAN_VERSION)}; {AGAIN}")
    del content  # so that it does not take memory beside the plan itself
    plan = validated(Plan, data, place, AGAIN)
    check_unchanged(fingerprint(plan), plan.fingerprint, place, AGAIN)
    return plan


def fleet_command(kind: str) -> str:
    """The command that runs the plan of a fleet of this kind."""
    return "tightfit fleet federate run" if kind.endswith("federated") else "tightfit fleet run"


def whole_json(data: bytes, place: str, again: str) -> Any:
    """What the JSON in `data` says. Raises InputError, which ends with the advice `again`, where it is not whole."""
    try:
        return from_json(data)
    except JsonError as error:
        raise InputError(f"{place}: not whole JSON ({error}), perhaps cut off or damaged; {again}") from error


def validated(schema: type[M], data: bytes, place: str, again: str) -> M:
    """The record that the JSON in `data` holds. Raises InputError, which names the first wrong field, otherwise."""
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{place}: field {where}: {first['msg']}; {again}") from error


def check_unchanged(found: str, stated: str, place: str, again: str) -> None:
    """Raise InputError where the fingerprint `found` of a file's content is not the one that it states."""
    if found != stated:
        raise InputError(
            f"{place}: its content does not match its fingerprint {stated[:12]}…: changed or damaged; {again}"
        )
