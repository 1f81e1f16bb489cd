"""A fleet's files: there and back, and what is said of files that are missing, damaged or of something else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tightfit.planner.fleet.io import key_path, load_fleet, load_member_plan, save_fleet
from tightfit.planner.fleet.schema import FLEET_VERSION
from tightfit.planner.fleet.simulate import simulate_fleet
from tightfit.planner.io import load_plan
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.fleet.keys import read_keys


@pytest.fixture
def folder(planned, tmp_path):
    save_fleet(*planned, tmp_path / "fleet")
    return tmp_path / "fleet"


@pytest.mark.slow
def test_there_and_back(planned, tmp_path):
    fleet, plans = planned
    path = save_fleet(fleet, plans, tmp_path / "new" / "fleet")
    assert path == tmp_path / "new" / "fleet" / "fleet.json"
    assert {file.name for file in path.parent.iterdir()} == {
        "fleet.json",
        "fleet.key",
        *(f"{name}.plan.json" for name in plans),
    }
    for place in (path, path.parent, str(path.parent)):
        found = load_fleet(place)
        assert found == fleet
        assert {name: load_member_plan(place, found, name) for name in plans} == plans
    simulate_fleet(found, plans)


def test_a_member_needs_its_own_files_only(planned, folder):
    fleet, plans = planned
    mine = fleet.names[0]
    for name in plans:
        if name != mine:
            (folder / f"{name}.plan.json").unlink()
    assert load_member_plan(folder, load_fleet(folder), mine) == plans[mine]
    missing = fleet.names[1]
    with pytest.raises(InputError, match=f"the plan of member '{missing}' is not beside the fleet's"):
        load_member_plan(folder, fleet, missing)


def test_the_key_lies_beside_the_plan_for_its_owner_alone(planned, tmp_path):
    keys = [key_path(save_fleet(*planned, tmp_path / name)) for name in ("one", "other", "one")]
    assert [path.stat().st_mode & 0o777 for path in keys] == [0o600] * 3
    names = [member.name for member in planned[0].members]
    assert len({read_keys(str(path), names, 0).secret for path in keys[:2]}) == 2
    keys[1].unlink()
    with pytest.raises(
        InputError, match=r"fleet\.key: the key .* is not beside the fleet's plan; copy the whole folder"
    ):
        key_path(tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        *((kind, "tightfit fleet run") for kind in ("data parallel", "pipeline", "mobillm")),
        *((kind, "tightfit fleet federate run") for kind in ("federated", "split federated")),
    ],
)
def test_where_one_devices_plan_is_wanted_a_fleets_is_called_what_it_is(folder, kind, command):
    path = folder / "fleet.json"
    path.write_bytes(rewritten(lambda content: content.update(kind=kind))(path.read_bytes()))
    with pytest.raises(InputError, match=rf"the plan of a fleet \({kind}\), not of one device; `{command} "):
        load_plan(path)


def test_files_are_read_without_the_solver():
    code = (
        "import sys, tightfit.planner.fleet.io; print([m for m in ('ortools', 'torch', 'numpy') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def refused(folder, edit):
    path = folder / "fleet.json"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        load_fleet(folder)
    assert str(path) in str(caught.value)
    assert "make it again" in str(caught.value)
    return str(caught.value)


def rewritten(change):
    def edit(data):
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return edit


def test_a_missing_file(tmp_path):
    for place in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="no such plan of a fleet"):
            load_fleet(place)


def test_cut_off(folder):
    assert "not whole JSON" in refused(folder, lambda data: data[: len(data) // 2])
    assert "not whole JSON" in refused(folder, lambda data: b"")


def test_a_plan_for_one_device(planned, folder):
    name = next(iter(planned[1]))
    plan = (folder / f"{name}.plan.json").read_bytes()
    assert "a plan for one device, not the plan of a fleet" in refused(folder, lambda data: plan)
    assert "something else, not the plan of a fleet" in refused(folder, lambda data: b"[1]")


@pytest.mark.parametrize(("version", "age"), [(FLEET_VERSION - 1, "an older"), (FLEET_VERSION + 1, "a newer")])
def test_another_version(folder, version, age):
    told = refused(folder, rewritten(lambda content: content.update(version=version, timeline=[])))
    said = f"written by {age} version of tightfit (fleet version {version}, this one reads version {FLEET_VERSION})"
    assert f"{said}; make it again with `tightfit fleet plan`" in told


def test_a_field_that_is_no_such_value(folder):
    def change(content):
        content["members"][0]["link"]["up_bytes_per_second"] = -1

    assert "field members.0.link.up_bytes_per_second: " in refused(folder, rewritten(change))


@pytest.mark.parametrize("field", ["budget_bytes", "first", "exchange_bytes"])
def test_a_changed_member(folder, field):
    def change(content):
        replica = content["replicas"][-1]
        for record in (content["members"][-1], replica, replica["parts"][0]):
            if field in record:
                record[field] += 1

    assert "does not match its fingerprint" in refused(folder, rewritten(change))


def test_a_changed_plan_of_a_member(planned, folder):
    fleet, _ = planned
    one, other = fleet.names[0], fleet.names[1]
    path = folder / f"{one}.plan.json"
    original = path.read_bytes()
    path.write_bytes((folder / f"{other}.plan.json").read_bytes())
    with pytest.raises(InputError, match="not the plan that the fleet was made with"):
        load_member_plan(folder, fleet, one)
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(InputError, match="not whole JSON"):
        load_member_plan(folder, fleet, one)


def test_members_that_have_no_plan(planned, folder):
    fleet, _ = planned
    with pytest.raises(
        InputError, match=f"member 'nobody': the fleet has none of that name; it has {fleet.members[0].name}, "
    ):
        load_member_plan(folder, fleet, "nobody")
    idle = fleet.members[0].model_copy(update={"name": "idle", "reason": "it has a holiday"})
    with pytest.raises(InputError, match=r"member 'idle' takes no part in a step \(it has a holiday\); these do: "):
        load_member_plan(folder, fleet.model_copy(update={"members": [*fleet.members, idle]}), "idle")


def test_a_place_that_takes_no_files(planned, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_fleet(*planned, tmp_path / "file")
