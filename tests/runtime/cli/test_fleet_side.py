"""`tightfit fleet plan --kind mobillm` and a run of both members by one command."""

from __future__ import annotations

import json

import pytest
from side_networks import side_profile
from tiny_plans import CONFIG, decoder_profile, device

from tightfit.profiles.io import save_profile
from tightfit.profiles.models.side_shape import SideShape

DESCRIPTION = """
micro_batches = 2
[[member]]
name = "phone"
profile = "phone.json"
memory = "400MiB"
link = "40Mbit/s"
[[member]]
name = "server"
profile = "server.json"
memory = "400MiB"
link = "1Gbit/s"
"""


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    folder = tmp_path_factory.mktemp("described")
    made = decoder_profile(folder, config=CONFIG).model_copy(update={"device": device(threads=1)})
    save_profile(made, folder / "phone.json")
    save_profile(side_profile(made, SideShape(blocks=(0, 1), rank=4)), folder / "server.json")
    (folder / "side.toml").write_text(DESCRIPTION)
    return folder / "side.toml"


def test_the_plan_says_what_passes_and_what_comes_of_it(tightfit, described, tmp_path):
    code, out, err = tightfit("fleet", "plan", described, "--kind", "mobillm", "-o", tmp_path, "--time-limit", 10)
    assert code == 0, err
    assert "trains the" in out  # what follows may stand on the next line of its cell
    out = " ".join(out.split())
    assert (
        "The result is a side network with adapters of rank 4, in server's folder side/: no adapter of the model" in out
    )
    assert "the outputs of the model's blocks 0, 1 (counted from 0), rounded to 8 bits" in out
    written = err.splitlines().index(f"plan written to {tmp_path / 'fleet.json'}")
    assert sum(line.startswith("  tightfit fleet run") for line in err.splitlines()[written:]) == 2
    code, out, _ = tightfit("fleet", "plan", described, "--kind", "mobillm", "--bits", 4, "-o", tmp_path, "--json")
    told = json.loads(out)
    assert (code, told["kind"], told["bits"], told["blocks"]) == (0, "mobillm", 4, [0, 1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "8"], "--steps is for fleets of another kind"),
        (["--bits", "5"], "--bits 5: it should be 0, 4 or 8"),
    ],
)
def test_what_there_is_not_is_refused(tightfit, described, tmp_path, words, said):
    code, _, err = tightfit("fleet", "plan", described, "--kind", "mobillm", "-o", tmp_path, *words)
    assert code == 2
    assert said in err


def test_the_device_needs_data(tightfit, described, tmp_path):
    tightfit("fleet", "plan", described, "--kind", "mobillm", "-o", tmp_path, "--time-limit", 5)
    code, _, err = tightfit("fleet", "run", tmp_path, "--data", "random", "--epochs", 1, "-o", tmp_path / "out")
    assert (code, "--epochs 1: the server of a mobillm fleet has no data" in err) == (2, True)
    code, _, err = tightfit("fleet", "run", tmp_path, "--steps", 2, "-o", tmp_path / "out")
    assert code == 2
    assert "--data is missing" in err


@pytest.mark.slow
def test_both_members_run_by_one_command(tightfit, described, tmp_path):
    tightfit("fleet", "plan", described, "--kind", "mobillm", "-o", tmp_path / "plan", "--time-limit", 5)
    words = ("--data", "random", "--eval", "random", "--steps", 4, "--no-cgroup", "-o", tmp_path / "out")
    code, out, err = tightfit("fleet", "run", tmp_path / "plan", *words, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["adapter"] == str(tmp_path / "out" / "server" / "side")
    assert (
        told["members"]["phone"]["evaluation"]["after"]["loss"]
        == told["members"]["server"]["evaluation"]["after"]["loss"]
    )
