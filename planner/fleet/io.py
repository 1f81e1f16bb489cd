"""Reads and writes a fleet's files: its plan, `fleet.json`, and beside it the plan of each member that takes part.

The plan is of one of two kinds: data parallel (`FleetPlan`) or federated (`FederatedPlan`). A member needs the fleet's plan and its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from tightfit.planner.fleet.federated_schema import FederatedPlan
from tightfit.planner.fleet.schema import FLEET_VERSION, FleetPlan
from tightfit.planner.io import check_unchanged, load_plan, save_plan, validated, whole_json
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import of_another_version, write_whole

F = TypeVar("F", FleetPlan, FederatedPlan)
FILE = "fleet.json"
AGAIN = "make it again with `tightfit fleet plan`"


def fleet_fingerprint(fleet: FleetPlan | FederatedPlan) -> str:
    """sha256 of a fleet's plan, without its own fingerprint."""
    content = fleet.model_dump(mode="json", exclude={"fingerprint"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed_fleet(fleet: F) -> F:
    """The fleet's plan with its fingerprint."""
    return fleet.model_copy(update={"fingerprint": fleet_fingerprint(fleet)})


def plan_file(name: str) -> str:
    """Name of the file of a member's plan."""
    return f"{name}.plan.json"


def save_fleet(fleet: FleetPlan | FederatedPlan, plans: Mapping[str, Plan], folder: str | os.PathLike[str]) -> Path:
    """Write a fleet's plan and those of its members, by name, to `folder`, each whole or not at all; the path of the
    fleet's.

    It is written last, so that it never names plans that are not there. Raises InputError where nothing can be written
    there, RunError where the disk is full.
    """
    folder = Path(folder)
    for member in fleet.members:
        if member.plan is not None:
            save_plan(plans[member.name], folder / plan_file(member.name))
    return write_whole(folder / FILE, fleet.model_dump_json())


def load_fleet(path: str | os.PathLike[str]) -> FleetPlan:
    """The fleet's plan in `path`, its file or the folder that holds it, checked against its fingerprint.

    Raises InputError for a file that is missing, cut off, changed, of another version or no fleet's plan at all.
    """
    path = fleet_path(path)
    return parse_fleet(_content(path), str(path))


def load_federated(path: str | os.PathLike[str]) -> FederatedPlan:
    """The federated plan in `path`, its file or the folder that holds it; as `load_fleet`."""
    path = fleet_path(path)
    return _parsed(_content(path), str(path), FederatedPlan, "federated")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such plan of a fleet; make one with `tightfit fleet plan`") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a fleet's plan or its folder") from error


def parse_fleet(data: bytes, place: str) -> FleetPlan:
    """The fleet's plan that `data` holds, checked against its fingerprint; `place` is where it comes from.

    Raises InputError for data that are cut off, changed, of another version or no fleet's plan at all.
    """
    return _parsed(data, place, FleetPlan, "data parallel")


def _parsed(data: bytes, place: str, schema: type[F], kind: str) -> F:
    content = whole_json(data, place, AGAIN)
    if not isinstance(content, dict) or "version" not in content or "members" not in content:
        plan = isinstance(content, dict) and "budget_bytes" in content
        what = "a plan for one device" if plan else "something else"
        raise InputError(f"{place}: {what}, not the plan of a fleet; {AGAIN}")
    if content["version"] != FLEET_VERSION:
        raise InputError(f"{place}: {of_another_version('fleet', content['version'], FLEET_VERSION)}; {AGAIN}")
    if (found := content.get("kind", kind)) != kind:
        way = "`tightfit fleet federate`" if found == "federated" else "`tightfit fleet run`"
        raise InputError(f"{place}: the plan of a fleet of another kind ({found}, not {kind}); use {way} with it")
    fleet = validated(schema, data, place, AGAIN)
    check_unchanged(fleet_fingerprint(fleet), fleet.fingerprint, place, AGAIN)
    return fleet


def load_member_plan(path: str | os.PathLike[str], fleet: FleetPlan | FederatedPlan, name: str) -> Plan:
    """The plan of the member `name`, beside the fleet's in `path`; checked to be the one that the fleet was planned with.

    Raises InputError for a member that is not there or takes no part, and as `tightfit.planner.io.load_plan`.
    """
    found = next((member for member in fleet.members if member.name == name), None)
    if found is None:
        known = ", ".join(member.name for member in fleet.members)
        raise InputError(f"member {name!r}: the fleet has none of that name; it has {known}")
    if found.plan is None:
        why = f" ({found.reason})" if found.reason else ""
        part = ", ".join(member.name for member in fleet.members if member.plan is not None)
        raise InputError(f"member {name!r} takes no part in a step{why}; these do: {part}")
    file = fleet_path(path).parent / Path(found.plan).name
    if not file.exists():
        raise InputError(f"{file}: the plan of member {name!r} is not beside the fleet's; copy it there, or {AGAIN}")
    plan = load_plan(file)
    if plan.fingerprint != found.plan_fingerprint:
        raise InputError(
            f"{file}: not the plan that the fleet was made with (fingerprint {plan.fingerprint[:12]}…, planned"
            f" {str(found.plan_fingerprint)[:12]}…); copy the fleet's folder again, or {AGAIN}"
        )
    return plan


def fleet_path(path: str | os.PathLike[str]) -> Path:
    """The fleet's file, where `path` is it or its folder."""
    path = Path(path)
    return path / FILE if path.is_dir() else path
