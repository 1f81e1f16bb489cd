"""A fleet of real processes: its adapter is that of one process to the bit, whoever computes what and whoever dies."""

from __future__ import annotations

import json
import signal
import time

import pytest
from fleets import Workshop, adapter_hash, ended, kill_training

MICRO_BATCHES = 6
OPTIONS = {"steps": 24, "lr": 1e-2, "seed": 3, "checkpoint_every": 12}
MEMORY, DISK = ("memory", "memory"), ("disk", "disk")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("fleet"), MICRO_BATCHES)


@pytest.fixture(scope="module")
def expected(workshop):
    """The adapter of one process that accumulates the same micro-batches."""
    return workshop.alone(workshop.folder / "alone", **OPTIONS)


def test_the_adapter_is_that_of_one_process(workshop, expected, tmp_path):
    fleet = workshop.fleet((1, 2, 3), (("memory", "disk"), DISK, MEMORY))
    found = ended(workshop.start(fleet, tmp_path, **OPTIONS))
    assert {name: code for name, (code, _) in found.items()} == {member.name: 0 for member in fleet.members}, found
    assert {adapter_hash(tmp_path / member.name) for member in fleet.members} == {expected}
    alone = json.loads((workshop.folder / "alone" / "report.json").read_text())
    reports = [json.loads((tmp_path / member.name / "report.json").read_text()) for member in fleet.members]
    assert all(report["fleet"]["loss"] == alone["loss"] for report in reports)
    for name, replica, report in zip(fleet.names, fleet.replicas, reports):
        steps = [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        own = range(replica.first + 1, replica.first + replica.micro_batches + 1)
        assert steps == [update * MICRO_BATCHES + one for update in range(4) for one in own]
        assert report["fleet"]["updates"] == 4
    # A checkpoint of a member is one of that process, too: its sum of gradients is zero after an update.
    state = "checkpoint-24/optimizer.safetensors"
    assert (tmp_path / "m0" / state).read_bytes() == (workshop.folder / "alone" / state).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["m0", "m2"])
def test_when_a_member_is_killed_the_others_save_and_name_it_and_another_fleet_goes_on(
    workshop, expected, tmp_path, victim
):
    options = OPTIONS | {"steps": 3000, "checkpoint_every": 0}
    members = workshop.start(workshop.fleet((2, 2, 2), (MEMORY, DISK)), tmp_path, **options)
    updates = tmp_path / "m1" / "fleet.jsonl"
    deadline = time.monotonic() + 60
    while not (updates.exists() and updates.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_training(members[victim])
    found = ended(members)
    others = {name: told for name, told in found.items() if name != victim}
    steps = set()
    for name, (code, said) in others.items():
        assert code == 4, found
        assert f"member '{victim}' of the fleet has ended" in said, found
        assert "start the fleet again with resume=True" in said
        steps.add(max(int(path.name.split("-")[1]) for path in (tmp_path / name).glob("checkpoint-*")))
    reached = max(steps)
    assert reached % MICRO_BATCHES == 0
    assert reached >= 2 * MICRO_BATCHES
    # Two members go on where three were; the first has lost its folder.
    steps = reached + 2 * MICRO_BATCHES
    whole = workshop.alone(tmp_path / "alone", **OPTIONS | {"steps": steps, "checkpoint_every": 0})
    survivor = next(iter(others))
    (tmp_path / "again").mkdir()
    (tmp_path / survivor).rename(tmp_path / "again" / "m1")
    fleet = workshop.fleet((5, 1), (DISK, MEMORY))
    found = ended(workshop.start(fleet, tmp_path / "again", **options | {"steps": steps, "resume": True}))
    assert [code for code, _ in found.values()] == [0, 0], found
    assert {adapter_hash(tmp_path / "again" / name) for name in found} == {whole}


@pytest.mark.slow
def test_a_signal_to_one_member_ends_all_after_the_same_step_and_they_can_go_on(workshop, tmp_path):
    options = OPTIONS | {"steps": 3000, "checkpoint_every": 0}
    fleet = workshop.fleet((3, 3), (MEMORY,))
    members = workshop.start(fleet, tmp_path, **options)
    updates = tmp_path / "m0" / "fleet.jsonl"
    deadline = time.monotonic() + 60
    while not updates.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    members["m1"].send_signal(signal.SIGTERM)
    found = ended(members)
    assert all(code == 4 and "continue with resume=True" in said for code, said in found.values()), found
    reached = {path.name for name in found for path in (tmp_path / name).glob("checkpoint-*")}
    assert len(reached) == 1
    steps = int(reached.pop().split("-")[1]) + MICRO_BATCHES
    found = ended(workshop.start(fleet, tmp_path, **options | {"steps": steps, "resume": True}))
    assert [code for code, _ in found.values()] == [0, 0], found
    whole = workshop.alone(tmp_path / "alone", **OPTIONS | {"steps": steps, "checkpoint_every": 0})
    assert {adapter_hash(tmp_path / name) for name in found} == {whole}


@pytest.mark.slow
def test_members_that_were_started_differently_are_told_in_what(workshop, tmp_path):
    found = ended(workshop.start(workshop.fleet((3, 3), (MEMORY,)), tmp_path, **OPTIONS, m1={"seed": 4}))
    assert [code for code, _ in found.values()] == [2, 2]
    for _, said in found.values():
        assert "different seed: member 'm1' has 4, 'm0' has 3" in said


@pytest.mark.slow
def test_a_fleet_without_any_checkpoint_is_not_resumed(workshop, tmp_path):
    found = ended(workshop.start(workshop.fleet((3, 3), (MEMORY,)), tmp_path, **OPTIONS, resume=True))
    words = "no member holds a checkpoint to resume from; start the fleet again without resume=True"
    assert all(code == 2 and words in said for code, said in found.values()), found
