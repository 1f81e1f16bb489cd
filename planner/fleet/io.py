"""Reads and writes a fleet's files: its plan, `fleet.json`, and beside it the plan of each member that takes part.

A member needs the fleet's plan, its own and the keys, `fleet.key`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from tightfit.planner.fleet.schema import (
    FLEET_VERSION,
    SERVER,
    AnyFleet,
    AnyRounds,
    AnyStepFleet,
    F,
    FederatedPlan,
    FleetPlan,
    PipelinePlan,
    SidePlan,
    SplitPlan,
)
from tightfit.planner.io import check_unchanged, fleet_command, load_plan, save_plan, validated, whole_json
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import of_another_version, read_whole, write_whole
from tightfit.runtime.engine.fleet.keys import new_pairs

K = TypeVar("K", bound=AnyFleet)
FILE, SERVER_FOLDER = "fleet.json", "server"
KEY = "fleet.key"
"""the file of the keys by which members know each other; for its owner alone"""
AGAIN = "make it again with `tightfit fleet plan`"


def fleet_fingerprint(fleet: AnyFleet) -> str:
    """sha256 of a fleet's plan, without its own fingerprint."""
    content = fleet.model_dump(mode="json", exclude={"fingerprint"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed_fleet(fleet: F) -> F:
    """The fleet's plan with its fingerprint."""
    return fleet.model_copy(update={"fingerprint": fleet_fingerprint(fleet)})


def plan_file(name: str) -> str:
    """Name of the file of a member's plan."""
    return f"{name}.plan.json"


def server_plan_file(name: str) -> str:
    """Name of the file of the server's plan for a device, in split federated rounds."""
    return f"{SERVER_FOLDER}/{plan_file(name)}"


def save_fleet(
    fleet: AnyFleet,
    plans: Mapping[str, Plan],
    folder: str | os.PathLike[str],
    server_plans: Mapping[str, Plan] | None = None,
) -> Path:
    """Write a fleet's plan, those of its members, by name, and those that the server of split rounds has for each of
    them to `folder`, each whole or not at all; the path of the fleet's.

    It is written last, so that it never names plans that are not there. Raises InputError where nothing can be written
    there, RunError where the disk is full.
    """
    folder = Path(folder)
    for name, plan in (server_plans or {}).items():
        save_plan(plan, folder / server_plan_file(name))
    for member in fleet.members:
        if member.plan is not None:
            save_plan(plans[member.name], folder / plan_file(member.name))
    if not isinstance(fleet, FederatedPlan):  # whose devices meet at Flower's server
        names = [*(member.name for member in fleet.members), SERVER]
        write_whole(folder / KEY, json.dumps(new_pairs(names), indent=2), mode=0o600)
    return write_whole(folder / FILE, fleet.model_dump_json())


def load_any(path: str | os.PathLike[str]) -> AnyStepFleet:
    """The plan in `path`, its file or the folder that holds it, of a fleet that meets at every step, checked against
    its fingerprint.

    Raises InputError for a file that is missing, cut off, changed, of another version or kind, or no fleet's plan at
    all.
    """
    found = _loaded(path, FleetPlan, PipelinePlan, SidePlan)
    assert isinstance(found, AnyStepFleet)
    return found


def load_rounds(path: str | os.PathLike[str]) -> AnyRounds:
    """The plan of federated rounds in `path`, split or not; as `load_any`."""
    found = _loaded(path, FederatedPlan, SplitPlan)
    assert isinstance(found, AnyRounds)
    return found


def _content(path: Path) -> bytes:
    try:
        return read_whole(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such plan of a fleet; make one with `tightfit fleet plan`") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a fleet's plan or its folder") from error


def _loaded(path: str | os.PathLike[str], *schemas: type[K]) -> K:
    """The plan in `path`, which is of one of these kinds; of the first where it does not say."""
    path = fleet_path(path)
    data, place = _content(path), str(path)
    content = whole_json(data, place, AGAIN)
    if not isinstance(content, dict) or "version" not in content or "members" not in content:
        plan = isinstance(content, dict) and "budget_bytes" in content
        what = "a plan for one device" if plan else "something else"
        raise InputError(f"{place}: {what}, not the plan of a fleet; {AGAIN}")
    if content["version"] != FLEET_VERSION:
        raise InputError(f"{place}: {of_another_version('fleet', content['version'], FLEET_VERSION)}; {AGAIN}")
    kinds = {str(schema.model_fields["kind"].default): schema for schema in schemas}
    found = str(content.get("kind", next(iter(kinds))))
    if found not in kinds:
        raise InputError(
            f"{place}: the plan of a fleet of another kind ({found}, not {' or '.join(kinds)});"
            f" `{fleet_command(found)}` runs it"
        )
    fleet = validated(kinds[found], data, place, AGAIN)
    check_unchanged(fleet_fingerprint(fleet), fleet.fingerprint, place, AGAIN)
    return fleet


def load_member_plan(path: str | os.PathLike[str], fleet: AnyFleet, name: str) -> Plan:
    """The plan of the member `name`, beside the fleet's in `path`; checked to be the one that the fleet was planned
    with.

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
    return _beside(
        fleet_path(path).parent / Path(found.plan).name, f"the plan of member {name!r}", found.plan_fingerprint
    )


def load_server_plan(path: str | os.PathLike[str], fleet: SplitPlan, name: str) -> Plan:
    """The server's plan for the device `name`, which takes part; otherwise as `load_member_plan`."""
    found = next(member for member in fleet.taking if member.name == name)
    file = fleet_path(path).parent / SERVER_FOLDER / Path(str(found.server_plan)).name
    return _beside(file, f"the server's plan for member {name!r}", found.server_plan_fingerprint)


def _beside(file: Path, what: str, fingerprint: str | None) -> Plan:
    """A plan in a fleet's folder, checked to be the one that the fleet was planned with."""
    if not file.exists():
        raise InputError(f"{file}: {what} is not beside the fleet's; copy it there, or {AGAIN}")
    plan = load_plan(file)
    if plan.fingerprint != fingerprint:
        raise InputError(
            f"{file}: not the plan that the fleet was made with (fingerprint {plan.fingerprint[:12]}…, planned"
            f" {str(fingerprint)[:12]}…); copy the fleet's folder again, or {AGAIN}"
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
