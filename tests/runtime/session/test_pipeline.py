"""A pipeline of real processes, each with some of the layers: its adapter is that of one uncut process, to the bit."""

from __future__ import annotations

import json
import signal
import time

import pytest
from fleets import BUDGET, Workshop, adapter_hash, ended, kill_training
from reference import MIXTURE

MICRO_BATCHES = 5
OPTIONS = {"steps": 15, "lr": 1e-2, "seed": 3, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("pipeline"), MICRO_BATCHES, layers=4)


@pytest.fixture(scope="module")
def expected(workshop):
    return workshop.alone(workshop.folder / "alone", **OPTIONS)


@pytest.mark.slow_but_for("two ahead")
@pytest.mark.parametrize(
    ("at", "ahead"),
    [((3,), (2, 0)), ((2, 4), (0, 0, 0)), ((3,), (9, 0))],
    ids=["two ahead", "three in turns", "further ahead than a step"],
)
def test_the_adapter_is_that_of_one_uncut_process(workshop, expected, tmp_path, at, ahead):
    fleet = workshop.pipeline(at, ahead)
    found = ended(workshop.start(fleet, tmp_path, **OPTIONS))
    assert {name: code for name, (code, _) in found.items()} == {member.name: 0 for member in fleet.members}, found
    assert adapter_hash(tmp_path / "m0") == expected
    one = workshop.folder / "alone" / "adapter" / "adapter_config.json"
    assert (tmp_path / "m0" / "adapter" / "adapter_config.json").read_text() == one.read_text()
    alone = [json.loads(line) for line in (workshop.folder / "alone" / "metrics.jsonl").read_text().splitlines()]
    for member in fleet.members:
        lines = [json.loads(line) for line in (tmp_path / member.name / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in alone]
        report = json.loads((tmp_path / member.name / "report.json").read_text())
        assert report["fleet"]["updates"] == 3
        assert report["peak_bytes"]["measured"] < BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("dense", [[], [1]], ids=["experts everywhere", "experts but for one layer"])
def test_what_routers_have_summed_up_goes_from_member_to_member(tmp_path, dense):
    config = MIXTURE | {"output_router_logits": True, "router_aux_loss_coef": 0.7, "mlp_only_layers": dense}
    workshop = Workshop(tmp_path / "workshop", MICRO_BATCHES, layers=4, config=config)
    expected = workshop.alone(tmp_path / "alone", **OPTIONS)
    found = ended(workshop.start(workshop.pipeline((2, 4), (1, 0, 0)), tmp_path, **OPTIONS))
    assert [code for code, _ in found.values()] == [0, 0, 0], found
    assert adapter_hash(tmp_path / "m0") == expected


@pytest.mark.slow
def test_messages_of_8_bits_are_another_result_near_the_exact_one(workshop, expected, tmp_path):
    found = ended(workshop.start(workshop.pipeline((3,), (1, 0), bits=8), tmp_path, **OPTIONS))
    assert [code for code, _ in found.values()] == [0, 0], found
    assert adapter_hash(tmp_path / "m0") != expected
    exact = json.loads((workshop.folder / "alone" / "report.json").read_text())["loss"]
    rounded = json.loads((tmp_path / "m0" / "report.json").read_text())["loss"]
    assert rounded == pytest.approx(exact, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["m0", "m1"])
def test_when_a_member_is_killed_the_others_save_and_all_go_on_from_what_all_have(workshop, tmp_path, victim):
    options = OPTIONS | {"steps": 3000, "checkpoint_every": 10}
    fleet = workshop.pipeline((2, 3), (2, 1, 0))
    members = workshop.start(fleet, tmp_path, **options)
    deadline = time.monotonic() + 60
    while not (tmp_path / "m1" / "checkpoint-20").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_training(members[victim])
    found = ended(members)
    for name, (code, said) in found.items():
        if name != victim:
            assert code == 4, found
            assert f"member '{victim}' of the fleet has ended" in said, found
    common = set.intersection(
        *({int(path.name.split("-")[1]) for path in (tmp_path / name).glob("checkpoint-*")} for name in found)
    )
    steps = max(common) + 2 * MICRO_BATCHES
    found = ended(workshop.start(fleet, tmp_path, **options | {"steps": steps, "resume": True}))
    assert [code for code, _ in found.values()] == [0, 0, 0], found
    assert adapter_hash(tmp_path / "m0") == workshop.alone(tmp_path / "alone", **options | {"steps": steps})


@pytest.mark.slow
def test_a_signal_to_one_member_ends_all_after_the_same_step(workshop, tmp_path):
    options = OPTIONS | {"steps": 3000, "checkpoint_every": 0}
    members = workshop.start(workshop.pipeline((3,), (1, 0)), tmp_path, **options)
    deadline = time.monotonic() + 60
    while not (tmp_path / "m0" / "fleet.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    members["m1"].send_signal(signal.SIGTERM)
    found = ended(members)
    assert all(code == 4 and "continue with resume=True" in said for code, said in found.values()), found
    assert len({path.name for name in found for path in (tmp_path / name).glob("checkpoint-*")}) == 1


def test_a_plan_of_some_layers_is_not_run_alone(workshop, tmp_path):
    from tightfit.planner.fleet.io import plan_file
    from tightfit.planner.io import load_plan
    from tightfit.runtime.common.errors import InputError
    from tightfit.runtime.session.launch import run

    fleet = workshop.pipeline((3,), (0, 0))
    with pytest.raises(InputError, match="one member of a pipeline"):
        run(load_plan(workshop.folder / plan_file(fleet.part("m0").plan)), "random", steps=5, out=tmp_path)
