"""Reads and writes a fleet's files: its plan, `fleet.json`, and beside it the plan of each member that takes part.

A member needs the fleet's plan, its own and the keys, `fleet.key`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tightfit.planner.fleet.schema import FLEET_VERSION, FleetPlan, Part
from tightfit.planner.io import check_unchanged, fleet_command, load_plan, save_plan, validated, whole_json
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import of_another_version, read_whole, write_whole
from tightfit.runtime.engine.fleet.keys import new_pairs

FILE = "fleet.json"
KEY = "fleet.key"
"""the file of the keys by which members know each other; for its owner alone"""
AGAIN = "make it again with `tightfit fleet plan`"


def fleet_fingerprint(fleet: FleetPlan) -> str:
    """sha256 of a fleet's plan, without its own fingerprint."""
    content = fleet.model_dump(mode="json", exclude={"fingerprint"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed_fleet(fleet: FleetPlan) -> FleetPlan:
    """The fleet's plan with its fingerprint."""
    return fleet.model_copy(update={"fingerprint": fleet_fingerprint(fleet)})


def plan_file(name: str) -> str:
    """Name of the file of the plan that a part calls `name`."""
    return f"{name}.plan.json"


def save_fleet(fleet: FleetPlan, plans: Mapping[str, Plan], folder: str | os.PathLike[str]) -> Path:
    """Write a fleet's plan and those of its parts, by the names that these have there, to `folder`, each whole or not
    at all; the path of the fleet's.

    It is written last, so that it never names plans that are not there. Raises InputError where nothing can be written
    there, RunError where the disk is full.
    """
    folder = Path(folder)
    for part in fleet.parts:
        save_plan(plans[part.plan], folder / plan_file(part.plan))
    if fleet.kind != "federated":  # whose devices meet at Flower's server
        names = [member.name for member in fleet.members]
        write_whole(folder / KEY, json.dumps(new_pairs(names), indent=2), mode=0o600)
    return write_whole(folder / FILE, fleet.model_dump_json())


def load_fleet(path: str | os.PathLike[str], *, in_rounds: bool | None = None) -> FleetPlan:
    """The plan in `path`, its file or the folder that holds it, checked against its fingerprint. `in_rounds`: whether
    it has to be of a fleet that meets in rounds, or at every step.

    Raises InputError for a file that is missing, cut off, changed, of another version or kind, or no fleet's plan at
    all.
    """
    path = fleet_path(path)
    data, place = _content(path), str(path)
    content = whole_json(data, place, AGAIN)
    if not isinstance(content, dict) or "version" not in content or "members" not in content:
        plan = isinstance(content, dict) and "budget_bytes" in content
        what = "a plan for one device" if plan else "something else"
        raise InputError(f"{place}: {what}, not the plan of a fleet; {AGAIN}")
    if content["version"] != FLEET_VERSION:
        raise InputError(f"{place}: {of_another_version('fleet', content['version'], FLEET_VERSION)}; {AGAIN}")
    fleet = validated(FleetPlan, data, place, AGAIN)
    if in_rounds not in (None, fleet.in_rounds):
        raise InputError(
            f"{place}: the plan of a fleet of another kind ({fleet.kind}); `{fleet_command(fleet.kind)}` runs it"
        )
    check_unchanged(fleet_fingerprint(fleet), fleet.fingerprint, place, AGAIN)
    return fleet


def _content(path: Path) -> bytes:
    try:
        return read_whole(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such plan of a fleet; make one with `tightfit fleet plan`") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a fleet's plan or its folder") from error


def load_member_plan(path: str | os.PathLike[str], fleet: FleetPlan, name: str) -> Plan:
    """The plan of the member `name`, beside the fleet's in `path`; checked to be the one that the fleet was planned
    with.

    Raises InputError for a member that is not there or takes no part, and as `tightfit.planner.io.load_plan`.
    """
    member = next((member for member in fleet.members if member.name == name), None)
    if member is None:
        known = ", ".join(member.name for member in fleet.members)
        raise InputError(f"member {name!r}: the fleet has none of that name; it has {known}")
    if member in fleet.idle:
        why = f" ({member.reason})" if member.reason else ""
        raise InputError(f"member {name!r} takes no part in a step{why}; these do: {', '.join(fleet.names)}")
    return load_part_plan(path, fleet.part(name))


def load_part_plan(path: str | os.PathLike[str], part: Part) -> Plan:
    """The plan of a part of the fleet whose plan is in `path`; as `load_member_plan`."""
    file = fleet_path(path).parent / plan_file(part.plan)
    if not file.exists():
        raise InputError(
            f"{file}: the plan of member {part.member!r} is not beside the fleet's; copy it there, or {AGAIN}"
        )
    plan = load_plan(file)
    if plan.fingerprint != part.plan_fingerprint:
        raise InputError(
            f"{file}: not the plan that the fleet was made with (fingerprint {plan.fingerprint[:12]}…, planned"
            f" {part.plan_fingerprint[:12]}…); copy the fleet's folder again, or {AGAIN}"
        )
    return plan


def key_path(path: str | os.PathLike[str]) -> Path:
    """The file of the key beside the fleet's plan in `path`. Raises InputError where it is missing."""
    key = fleet_path(path).parent / KEY
    if not key.is_file():
        raise InputError(
            f"{key}: the key by which the members know each other is not beside the fleet's plan; copy the whole"
            f" folder, or {AGAIN}"
        )
    return key


def fleet_path(path: str | os.PathLike[str]) -> Path:
    """The fleet's file, where `path` is it or its folder."""
    path = Path(path)
    return path / FILE if path.is_dir() else path
