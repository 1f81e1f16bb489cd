"""A device's part of a round, with a real run: what it answers, and what becomes of it where something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from federated_fleets import tiny_fleet
from safetensors.numpy import load

from tightfit.planner.fleet.io import plan_file
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.federated.aggregate import closed, shapes_of, started
from tightfit.runtime.federated.device import DeviceSettings, take_part
from tightfit.runtime.federated.messages import Answer, Order


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    return folder, *tiny_fleet(folder, steps=4, ranks=(4, 2), speeds=(1e-3, 1e-3), start=1.0)


@pytest.fixture
def device(fleet, tmp_path):
    folder, planned, _ = fleet

    def made(name, **changes):
        plan, rank = folder / "fleet" / plan_file(planned.part(name).plan), planned.replica(name).rank
        told = {"member": name, "plan": str(plan), "rank": rank, "data": "random"}
        return DeviceSettings(**told | {"work": str(tmp_path / name), "cgroup": False} | changes)

    return made


def order(**changes):
    told = {
        "round": 1,
        "steps": json.dumps({"a": 2, "b": 3}),
        "lr": 1e-2,
        "weight_decay": 0.0,
        "seed": 1,
        "seconds": 60.0,
    }
    return Order(**told | changes)


@pytest.mark.slow
def test_a_device_of_a_smaller_rank_gets_the_first_components(fleet, device):
    _, _, plans = fleet
    given = closed(started(shapes_of(plans["a"]), 5))
    answer, trained = take_part(device("b"), order(lr=0.0), lambda: given)
    assert answer.error == ""
    for name, values in load(trained).items():
        whole = load(given)[name]
        assert (values == (whole[:2] if "lora_A" in name else whole[:, :2])).all()


def test_what_goes_wrong_is_answered(fleet, device):
    _, _, plans = fleet
    given = closed(started(shapes_of(plans["a"]), 5))
    for changed, told, adapter, why in (
        (device("a", data="/nonexistent.jsonl"), order(), given, "the run ended with code 2: /nonexistent.jsonl"),
        (device("a"), order(), given[:-4], "the fleet's adapter: an adapter that is cut off"),
        (device("a"), order(steps='{"b": 3}'), given, "member 'a' takes no part in the fleet's rounds"),
        (device("a"), order(seconds=0.5), given, "the round's 0 seconds were over before the run had ended"),
    ):
        answer, trained = take_part(changed, told, lambda adapter=adapter: adapter)
        assert trained == b""
        assert why in answer.error
        assert (answer.round, answer.member) == (1, "a")


def test_a_run_ends_with_the_process_that_waits_for_it(fleet, device, tmp_path):
    _, _, plans = fleet
    (tmp_path / "adapter").write_bytes(closed(started(shapes_of(plans["a"]), 5)))
    settings = device("a").write()
    script = (
        "import sys; from pathlib import Path\n"
        "from tightfit.runtime.federated.device import DeviceSettings, take_part\n"
        "from tightfit.runtime.federated.messages import Order\n"
        "order = Order(round=1, steps='{\"a\": 100000}', lr=0.0, weight_decay=0.0, seed=1, seconds=600.0)\n"
        "take_part(DeviceSettings.read(sys.argv[1]), order, lambda: Path(sys.argv[2]).read_bytes())\n"
    )
    waiting = subprocess.Popen(
        [sys.executable, "-c", script, settings, str(tmp_path / "adapter")],
        env=os.environ | {"PYTHONPATH": interpreter.python_path()},
    )
    metrics = tmp_path / "a" / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    until(lambda: not runs_of(tmp_path))


def runs_of(folder):
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def until(done, seconds=60.0):
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_settings_are_read_as_they_were_written(device):
    one = device("a", truncate=True)
    assert DeviceSettings.read(one.write()) == one
    with pytest.raises(InputError, match="not the settings of a device"):
        DeviceSettings.read(one.work)


def test_words_are_read_as_they_were_written():
    answer = Answer(round=3, member="a", tokens=5, loss=0.5)
    assert Answer.of({**answer.words(), "of a newer version": 1}) == answer
    with pytest.raises(KeyError):
        Answer.of({"round": 1})
    with pytest.raises(ValueError, match="invalid literal"):
        Answer.of({**answer.words(), "round": "x"})


def test_the_device_side_lives_of_the_standard_library():
    script = "import sys, tightfit.runtime.federated.node; print([m for m in sys.modules if '.' not in m])"
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": interpreter.python_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "numpy", "pydantic", "flwr", "typer", "safetensors", "rich"} & set(eval(told.stdout))
