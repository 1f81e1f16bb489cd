"""The commands `tightfit fleet federate ...` where a server computes the upper layers, without Flower's processes."""

import json
from pathlib import Path

import pytest
from federated_fleets import timed, tiny_fleet, tiny_split_fleet
from tiny_plans import CONFIG, decoder_profile

from tightfit.planner.fleet.io import load_fleet, load_part_plan
from tightfit.profiles.io import save_profile
from tightfit.runtime.cli import main as command_line
from tightfit.runtime.federated import flower, server
from tightfit.runtime.federated.device import DeviceSettings

DESCRIPTION = """steps = 4
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
[server]
profile = "server.json"
memory = "500MiB"
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    tiny_split_fleet(folder)
    return folder / "fleet"


def main(words):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        command_line.main([*map(str, words)])
    return ended.value.code


@pytest.mark.slow
def test_a_plan_is_made_and_told(tmp_path, capsys):
    profile = decoder_profile(tmp_path / "store", config={**CONFIG, "num_hidden_layers": 3})
    for name, seconds in (("quick", 1e-5), ("slow", 1e-3), ("server", 1e-4)):
        save_profile(timed(profile, seconds), tmp_path / f"{name}.json")
    (tmp_path / "fleet.toml").write_text(DESCRIPTION)
    words = ["fleet", "plan", tmp_path / "fleet.toml", "-o", tmp_path / "plan", "--server-start", "0.5"]
    assert main([*words, "--start", "1", "--time-limit", "20", "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    fleet = load_fleet(tmp_path / "plan", in_rounds=True)
    assert summary["fingerprint"] == fleet.fingerprint
    devices = [replica["parts"][0] for replica in summary["replicas"]]
    assert {part["member"]: part["layers"] for part in devices} == {"quick": [0, 3], "slow": [0, 2]}
    assert [member.name for member in fleet.members] == [*fleet.names, "server"]
    assert (fleet.member("server").start_seconds, fleet.members[0].start_seconds) == (0.5, 1.0)
    for replica in fleet.replicas:
        assert load_part_plan(tmp_path / "plan", replica.parts[-1]).budget_bytes == 500 << 20
    assert main([*words, "--steps", "2", "--time-limit", "20"]) == 0
    said = capsys.readouterr()
    assert "A round of 2 steps" in said.out
    assert "With one cut for all it would take" in said.out
    assert "Devices send the labels of their data" in said.out


@pytest.fixture
def run(planned, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(flower, "check_installed", lambda: None)
    monkeypatch.setattr(server, "serve", lambda *words, **_: served.append(words) or {"rounds": []})

    def made(*words):
        code = main(["fleet", "federate", "run", planned, "--rounds", "2", "-o", tmp_path / "out", *words])
        return code, served[-1] if served else None

    return made


@pytest.mark.slow
def test_runs_of_the_server_listen_where_devices_reach_them(run, capsys):
    code, _ = run("--insecure", "--host", "0.0.0.0")
    assert code == 2
    assert (
        "--host 0.0.0.0 is no address that devices reach; give the server's own with --meet HOST"
        in capsys.readouterr().err
    )
    for given, meant in (("here", ("here", 29400)), ("here:77", ("here", 77))):
        code, (options, _) = run("--insecure", "--host", "0.0.0.0", "--meet", given)
        assert code == 0
        assert (options.meet, options.port, options.cgroup) == (*meant, True)
    assert run("--insecure", "--meet", "here:x")[0] == 2
    assert "here:x: give HOST or HOST:PORT" in capsys.readouterr().err


def test_devices_on_this_machine_are_prepared(run, planned, tmp_path):
    code, (options, serving) = run("--data", "random", "--no-cgroup")
    assert code == 0
    assert (options.meet, options.port, options.cgroup) == ("127.0.0.1", 0, False)
    assert {device.member for device in serving.devices} == {"a", "b"}
    for device in serving.devices:
        assert Path(device.labels).is_file()
        assert device.data == str(tmp_path / "out" / "devices" / device.member / "data" / "train.records")
        assert device.fleet == str(planned)
        assert device.server == "127.0.0.1"
        assert DeviceSettings.read(device.write()) == device


def test_it_is_for_split_plans(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flower, "check_installed", lambda: None)
    tiny_fleet(tmp_path, steps=4)
    given = ["fleet", "federate", "run", tmp_path / "fleet", "--rounds", "2", "-o", tmp_path / "out", "--insecure"]
    assert main([*given, "--meet", "here"]) == 2
    assert "--meet here: the devices of this plan hold all layers" in capsys.readouterr().err
    stage = ["fleet", "federate", "stage", tmp_path / "fleet", "--member", "a", "--at", "here:1", "--data", "random"]
    stage += ["--steps", "2", "-o", tmp_path / "out", "--adapter", tmp_path, "--timeout", "1"]
    assert main(stage) == 2
    assert "its devices hold all layers; plan rounds with a [server]" in capsys.readouterr().err
