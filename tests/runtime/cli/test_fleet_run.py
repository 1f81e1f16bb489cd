"""`tightfit fleet run`: real processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from changed_operators import with_operators
from fleets import adapter_hash
from tiny_plans import decoder_profile

from tightfit.planner.io import save_plan
from tightfit.planner.plan import planner_of
from tightfit.profiles.io import save_profile
from tightfit.profiles.schema import adamw
from tightfit.runtime.cli import main
from tightfit.runtime.common.interpreter import command, python_path
from tightfit.runtime.session.fleet import free_port
from tightfit.runtime.session.output import is_locked

MICRO_BATCHES = 4
TRAINING = ("--data", "random", "--steps", "8", "--lr", "1e-2", "--seed", "5", "--checkpoint-every", "0")
DESCRIPTION = """
micro_batches = 4
[[member]]
name = "a"
profile = "profile.json"
memory = "400MiB"
link = "1Gbit/s"
[[member]]
name = "b"
profile = "profile.json"
memory = "400MiB"
link = "1Gbit/s"
"""


def tightfit(*words, code=0):
    environment = os.environ | {"PYTHONPATH": python_path()}
    found = subprocess.run(
        command("tightfit.runtime.cli.main", *map(str, words)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code, found.stderr
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fleet's plan for two members, and beside it the adapter of one process."""
    made = tmp_path_factory.mktemp("fleet")
    traced = with_operators(decoder_profile(made), lambda _: {"seconds": 1e-3})
    floor = traced.device.floor.model_copy(update={"supervisor_bytes": 20 << 20})
    device = traced.device.model_copy(update={"threads": 1, "floor": floor})
    profile = traced.model_copy(update={"device": device})
    save_profile(profile, made / "profile.json")
    (made / "fleet.toml").write_text(DESCRIPTION)
    planned = tightfit("fleet", "plan", made / "fleet.toml", "-o", made / "plan")
    first = json.loads((made / "plan" / "fleet.json").read_text())["members"][0]["name"]
    assert f"they meet at '{first}': HOST is an address of that one" in planned.stderr
    assert all(f"--member {name} --at HOST:29400 --data DATA" in planned.stderr for name in "ab")
    alone = profile.model_copy(update={"optimizer": adamw(MICRO_BATCHES)})
    save_plan(planner_of(alone).plan(400 << 20), made / "alone.json")
    tightfit("run", made / "alone.json", *TRAINING, "-o", made / "alone")
    return made


def test_all_members_run_here(folder, tmp_path):
    # The length is told as epochs: the made-up data are 256 samples, two of which are a micro-batch.
    length = ("--epochs", str(7.5 / 128))  # rounded up to whole steps of the fleet
    words = [word for word in TRAINING if word not in ("--steps", "8")]
    found = tightfit("fleet", "run", folder / "plan", *words, *length, "-o", tmp_path / "out", "--json")
    told = json.loads(found.stdout)
    assert set(told["members"]) == {"a", "b"}
    assert "step 2: loss" in found.stderr
    assert {adapter_hash(tmp_path / "out" / name) for name in "ab"} == {adapter_hash(folder / "alone")}
    assert "exists" not in found.stderr
    again = tightfit("fleet", "run", folder / "plan", *TRAINING, "-o", tmp_path / "out", code=4)
    assert "holds an earlier run" in again.stderr


def test_members_get_the_columns_of_the_data(folder, tmp_path):
    words = (*TRAINING, "--columns", "prompt=question", "-o", tmp_path / "out", "--json")
    found = json.loads(tightfit("fleet", "run", folder / "plan", *words, code=4).stdout)
    assert "columns question: the data given have none; leave them out" in found["error"]["message"]


@pytest.mark.slow
def test_a_pipeline_is_planned_and_run_with_its_evaluation(folder, tmp_path):
    tightfit("fleet", "plan", folder / "fleet.toml", "--kind", "pipeline", "-o", tmp_path / "plan")
    planned = json.loads((tmp_path / "plan" / "fleet.json").read_text())
    assert planned["kind"] == "pipeline"
    chain = [part["member"] for part in planned["replicas"][0]["parts"]]
    assert len(chain) == 2
    words = ("fleet", "run", tmp_path / "plan", *TRAINING, "--eval", "random", "-o", tmp_path / "out", "--json")
    told = json.loads(tightfit(*words).stdout)
    assert adapter_hash(tmp_path / "out" / chain[0]) == adapter_hash(folder / "alone")
    reports = [told["members"][name] for name in chain]
    assert reports[0]["evaluation"]["after"]["loss"] == reports[1]["evaluation"]["after"]["loss"]
    for report in reports:
        assert report["peak_bytes"]["measured"] <= report["peak_bytes"]["predicted"] + (1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "who", ["the first, for whom nobody comes", "another, who finds nobody", "all, while they train"]
)
def test_after_sigterm_the_next_try_in_the_same_folder_begins(folder, tmp_path, who):
    """It meets no run that is under way, however the first one was ended."""
    chain = [member["name"] for member in json.loads((folder / "plan" / "fleet.json").read_text())["members"]]
    words = ["fleet", "run", folder / "plan", "--data", "random", "--lr", "1e-2", "--seed", "5", "-o", tmp_path / "out"]
    here = chain if who.startswith("all") else chain[who.startswith("another") :][:1]
    at = f"127.0.0.1:{free_port(count=len(chain))}"
    alone = [] if here == chain else ["--member", *here, "--at", at, "--timeout", "600"]
    begun = subprocess.Popen(
        command("tightfit.runtime.cli.main", *map(str, words), "--steps", "8000", *alone),
        env=os.environ | {"PYTHONPATH": python_path()},
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = [tmp_path / "out" / name / ("fleet.jsonl" if here == chain else "job") for name in here]
    until = time.monotonic() + 60
    while not all(map(Path.exists, seen)) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(2.0)
    assert all(is_locked(tmp_path / "out" / name) for name in here)
    begun.send_signal(signal.SIGTERM)
    _, said = begun.communicate(timeout=60)
    assert begun.returncode == 4, said
    assert not any(is_locked(tmp_path / "out" / name) for name in here)
    again = ["--steps", "8", "--checkpoint-every", "0", "--overwrite"]
    tightfit(*words, *again)
    assert {adapter_hash(tmp_path / "out" / name) for name in chain} == {adapter_hash(folder / "alone")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("fleet", "run", "plan", *TRAINING, "-o", "out", "--member", "c", "--at", "127.0.0.1"),
            "those that compute are",
        ),
        (("fleet", "run", "plan", *TRAINING, "-o", "out", "--member", "a"), "--member and --at belong together"),
        (
            ("fleet", "run", "plan", *TRAINING, "-o", "out", "--timeout", "nan"),
            "--timeout nan: give a number of seconds",
        ),
        (
            ("fleet", "run", "plan", *TRAINING, "-o", "out", "--member", "a", "--at", "x:y"),
            "--at x:y: give HOST or HOST:PORT",
        ),
        (("fleet", "run", "plan", "--data", "random", "--steps", "6", "-o", "out"), "give a multiple of that"),
        (("run", "plan", *TRAINING, "-o", "out"), "tightfit fleet run"),
        (("run", "plan/fleet.json", *TRAINING, "-o", "out"), "tightfit fleet run"),
        (
            ("fleet", "run", "plan", *TRAINING, "-o", "out", "--member", "FIRST", "--at", "203.0.113.7"),
            "203.0.113.7 is no address of this machine: member 'FIRST', this one, listens there",
        ),
        (("run", "plan/a.plan.json", *TRAINING, "-o", "out"), "makes no update by itself"),
    ],
)
def test_what_cannot_be_run_is_told(folder, tmp_path, words, said):
    first = json.loads((folder / "plan" / "fleet.json").read_text())["members"][0]["name"]
    words, said = [word.replace("FIRST", first) for word in words], said.replace("FIRST", first)
    placed = [str(folder / word) if word.startswith("plan") else word for word in words]
    placed = [str(tmp_path / word) if word in ("out", "nowhere") else word for word in placed]
    assert said in tightfit(*placed, code=2).stderr


@pytest.mark.slow
def test_a_program_may_start_a_fleet_by_the_command_in_its_own_process(folder, tmp_path):
    """Its own command line is another one then."""
    with pytest.raises(SystemExit) as ended:
        main.main(["fleet", "run", str(folder / "plan"), *TRAINING, "-o", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert {adapter_hash(tmp_path / "out" / name) for name in "ab"} == {adapter_hash(folder / "alone")}
