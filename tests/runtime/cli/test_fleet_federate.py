"""The commands `tightfit fleet federate ...` without Flower's processes: plans, what is refused, what is told."""

import json

import pytest
from federated_fleets import timed, tiny_fleet
from tiny_plans import decoder_profile

from tightfit.planner.fleet.io import load_fleet
from tightfit.profiles.io import save_profile
from tightfit.runtime.cli import main as command_line
from tightfit.runtime.federated import flower, server
from tightfit.runtime.federated.options import RoundOptions

DESCRIPTION = """steps = 12
[[member]]
name = "quick"
profile = "quick.json"
memory = "400MiB"
link = "10MB/s"
[[member]]
name = "slow"
profile = "slow.json"
memory = "400MiB"
link = "10MB/s"
"""


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A folder with the description of two devices, one half as fast as the other."""
    folder = tmp_path_factory.mktemp("described")
    profile = decoder_profile(folder / "store")
    for name, seconds in (("quick", 5e-3), ("slow", 1e-2)):
        save_profile(timed(profile, seconds), folder / f"{name}.json")
    (folder / "fleet.toml").write_text(DESCRIPTION)
    return folder


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    tiny_fleet(folder, steps=4)
    return folder / "fleet"


def main(words):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        command_line.main(words)
    return ended.value.code


def told(capsys):
    said = capsys.readouterr()
    return said.out, said.err


def test_a_plan_is_made_and_told(described, tmp_path, capsys):
    words = ["fleet", "plan", str(described / "fleet.toml"), "-o", str(tmp_path), "--start", "0.5"]
    assert main([*words, "--json"]) == 0
    out, _ = told(capsys)
    summary = json.loads(out)
    fleet = load_fleet(tmp_path, in_rounds=True)
    assert [replica["micro_batches"] for replica in summary["replicas"]] == [8, 4]
    assert summary["fingerprint"] == fleet.fingerprint
    assert fleet.members[0].start_seconds == 0.5
    assert main([*words, "--steps", "3"]) == 0
    out, err = told(capsys)
    assert "A round of 3 local steps" in out
    assert "With equal steps it would take" in out
    assert f"plan written to {tmp_path / 'fleet.json'}" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min", "3"], "--min 3: 2 devices take part in this plan; give at most that"),
        (["--min", "0"], "--min 0: it should be greater than or equal to 1"),
        (["--timeout", "0"], "--timeout 0.0: it should be greater than 0"),
        (["--schedule", "steep"], "--schedule 'steep': it should be 'constant', 'linear' or 'cosine'"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--ssl-certfile", "x"], "belong together"),
        (["--ssl-certfile", "x", "--ssl-keyfile", "y", "--ssl-ca-certfile", "z"], "x: no such file"),
    ],
)
def test_options_that_cannot_be_used_are_refused(planned, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(flower, "check_installed", lambda: None)
    given = ["fleet", "federate", "run", str(planned), "--rounds", "2", "-o", str(tmp_path / "out"), "--data", "random"]
    assert main([*given, *words]) == 2
    assert message in told(capsys)[1]
    assert not (tmp_path / "out").exists()


def test_other_machines_are_served_over_tls_unless_asked(planned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flower, "check_installed", lambda: None)
    served = []
    monkeypatch.setattr(server, "serve", lambda *words, **more: served.append((words, more)) or {"rounds": []})
    given = ["fleet", "federate", "run", str(planned), "--rounds", "2", "-o", str(tmp_path / "out")]
    assert main(given) == 2
    assert "devices join over TLS" in told(capsys)[1]
    assert main([*given, "--insecure"]) == 0
    assert "tightfit fleet federate join FOLDER --member b --superlink HOST:9092 --insecure" in told(capsys)[1]
    ((options, serving), more), = served  # fmt: skip
    assert isinstance(options, RoundOptions)
    assert (options.rounds, serving.port, serving.tls, more["resume"]) == (2, 9092, None, False)


def test_devices_on_this_machine_have_data_of_their_own(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(flower, "check_installed", lambda: None)
    served = []
    monkeypatch.setattr(server, "serve", lambda options, serving, **_: served.append(serving) or {"rounds": []})
    given = ["fleet", "federate", "run", str(planned), "--rounds", "2", "-o", str(tmp_path / "out")]
    assert main([*given, "--data", str(tmp_path / "{member}.jsonl")]) == 0
    assert [device.data for device in served[0].devices] == [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    assert [device.plan for device in served[0].devices] == [str(planned / f"{name}.plan.json") for name in "ab"]


def test_devices_that_take_no_part_cannot_join(planned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flower, "check_installed", lambda: None)
    given = ["fleet", "federate", "join", str(planned), "--data", "random", "-o", str(tmp_path)]
    assert main([*given, "--superlink", "here:9092", "--member", "zzz"]) == 2
    assert "member 'zzz': the fleet has none of that name" in told(capsys)[1]
    assert main([*given, "--superlink", "here", "--member", "a"]) == 2
    assert "superlink 'here': give HOST:PORT" in told(capsys)[1]
    assert main([*given, "--superlink", "here:1", "--member", "a", "--insecure", "--private-key", "k"]) == 2
    assert "--insecure is without certificates and keys" in told(capsys)[1]


def test_without_flower_it_says_what_to_install(planned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flower.importlib.util, "find_spec", lambda name: None)
    given = ["fleet", "federate", "run", str(planned), "--rounds", "2", "-o", str(tmp_path / "out"), "--data", "random"]
    assert main(given) == 2
    assert "pip install 'tightfit[fleet]'" in told(capsys)[1]
