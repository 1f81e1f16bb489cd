"""The commands `tightfit fleet ...`: what they ask the planner for, what they print and write, how they fail."""

from __future__ import annotations

import json

import pytest
from sample_fleets import member_plans, sample_fleet
from synthetic import small_chain

from tightfit.planner.fleet import fleet_planner as planner
from tightfit.planner.fleet import io as fleet_io
from tightfit.profiles.io import save_profile
from tightfit.runtime.common.errors import InfeasibleError
from tightfit.runtime.common.units import MIB

DESCRIPTION = """
micro_batches = 8
[[member]]
name = "laptop"
profile = "profile.json"
memory = "320MiB"
link = "100Mbit/s"
[[member]]
name = "phone"
profile = "profile.json"
memory = "250MiB"
link = "100Mbit/s"
latency = "2ms"
"""


@pytest.fixture
def described(tmp_path):
    save_profile(small_chain(3, layers=2), tmp_path / "profile.json")
    (tmp_path / "fleet.toml").write_text(DESCRIPTION)
    return tmp_path / "fleet.toml"


@pytest.fixture
def planned(monkeypatch):
    """Let the planner answer with the sample; returns what it was asked for and what was saved."""
    asked = {}

    def plan_fleet(described, **options):
        members = [(m.name, m.budget_bytes, m.link) for m in described.members]
        asked.update(options, members=members, micro_batches=described.count)
        return sample_fleet(), member_plans(), "data parallel: for a reason"

    def save_fleet(fleet, plans, folder):
        asked.update(saved=(fleet, sorted(plans)))
        folder.mkdir(parents=True)
        (folder / "fleet.json").write_text(fleet.model_dump_json())
        return folder / "fleet.json"

    monkeypatch.setattr(planner, "plan_fleet", plan_fleet)
    monkeypatch.setattr(fleet_io, "save_fleet", save_fleet)
    return asked


def test_a_fleet_is_planned_written_and_told(tightfit, planned, described, tmp_path):
    code, out, err = tightfit("fleet", "plan", described, "-o", tmp_path / "out")
    assert code == 0
    assert any(line.split()[:3] == ["laptop", "5", "1.000"] for line in out.splitlines())
    assert "one step of 8 micro-batches takes 7.250 s" in out
    written = err.splitlines().index(f"plan written to {tmp_path / 'out' / 'fleet.json'}")
    commands = [line.split() for line in err.splitlines()[written:] if line.startswith("  tightfit fleet run")]
    assert [words[words.index("--member") + 1] for words in commands] == ["laptop", "phone"]
    names = [(name, budget // MIB, link.latency_seconds) for name, budget, link in planned["members"]]
    assert names == [("laptop", 320, 0.0), ("phone", 250, 0.002)]
    assert {link.up_bytes_per_second for _, _, link in planned["members"]} == {12.5e6}
    assert (planned["micro_batches"], planned["time_limit"]) == (8, pytest.approx(120.0, abs=10.0))
    assert (planned["kind"], planned["bits"]) == ("auto", None)
    assert "data parallel: for a reason" in err.splitlines()
    assert planned["saved"] == (sample_fleet(), ["laptop", "phone"])


def test_options_reach_the_planner(tightfit, planned, described, tmp_path):
    words = ("--micro-batches", 12, "--time-limit", 5)
    assert tightfit("fleet", "plan", described, "-o", tmp_path / "out", *words)[0] == 0
    assert planned["micro_batches"] == 12
    assert 0 < planned["time_limit"] <= 5.0
    words = ("--kind", "pipeline", "--bits", 8)
    assert tightfit("fleet", "plan", described, "-o", tmp_path / "other", *words)[0] == 0
    assert (planned["kind"], planned["bits"]) == ("pipeline", 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kind", "tensor"), "--kind 'tensor': it should be 'auto', 'data', 'pipeline', 'mobillm' or 'federated'"),
        (("--bits", 5), "--bits 5: it should be 0, 4 or 8"),
        (("--start", 2), "--start 2.0 is for fleets of another kind; plan auto without it"),
        (("--kind", "data", "--steps", 8), "--steps is for fleets of another kind; plan data without it"),
        (
            ("--kind", "federated", "--steps", 4, "--bits", 8),
            "--bits 8 is for fleets of another kind; plan federated without it",
        ),
        (("--kind", "data", "--bits", 8), "--bits 8 is for fleets of another kind; plan data without it"),
    ],
)
def test_kinds_and_bits_that_are_none(tightfit, described, tmp_path, words, message):
    assert tightfit("fleet", "plan", described, "-o", tmp_path / "out", *words) == (2, "", f"tightfit: {message}\n")


def test_a_fleet_as_json(tightfit, planned, described, tmp_path):
    code, out, _ = tightfit("fleet", "plan", described, "-o", tmp_path / "out", "--json")
    assert code == 0
    assert out.count("\n") == 1
    told = json.loads(out)
    assert (told["makespan_seconds"], told["bit_identical"], told["interrupted"]) == (7.25, True, False)
    assert [member["name"] for member in told["members"]] == ["laptop", "phone", "watch"]
    shares = [(part["member"], replica["micro_batches"]) for replica in told["replicas"] for part in replica["parts"]]
    assert shares == [("laptop", 5), ("phone", 3)]
    assert told["fleet"] == str(tmp_path / "out" / "fleet.json")


def test_what_was_planned_is_told_even_where_it_cannot_be_written(tightfit, planned, described, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fleet_io, "save_fleet", full)
    code, out, _ = tightfit("fleet", "plan", described, "-o", tmp_path / "out", "--json")
    assert code == 4
    told = json.loads(out)
    assert told["makespan_seconds"] == 7.25
    assert "No space left" in told["error"]["message"]


def test_a_fleet_that_nobody_can_hold_says_so(tightfit, described, tmp_path, monkeypatch):
    def plan_fleet(*_, **__):
        raise InfeasibleError("no member can hold a micro-batch; give one of them more memory")

    monkeypatch.setattr(planner, "plan_fleet", plan_fleet)
    code, out, err = tightfit("fleet", "plan", described, "-o", tmp_path / "out")
    assert (code, out) == (3, "")
    assert err == "tightfit: no member can hold a micro-batch; give one of them more memory\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fleet", "plan"], "Missing argument 'FLEET.toml'; try 'tightfit fleet plan --help'"),
        (["fleet", "plan", "f.toml", "-o", "o", "--time-limit", "-1"], "--time-limit -1.0: it should be greater than 0"),
        (["fleet", "plan", "f.toml", "-o", "o", "--micro-batches", "0"], "Invalid value for '--micro-batches': 0 is not in the range x>=1; try 'tightfit fleet plan --help'"),
        (
            ["fleet", "plan", "f.toml", "-o", "o"],
            "f.toml: No such file or directory; `tightfit fleet plan --help` says what a description of a fleet holds",
        ),
    ],
)  # fmt: skip
def test_a_wrong_command_line(tightfit, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tightfit(*words) == (2, "", f"tightfit: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_files_is_refused_before_the_work(tightfit, planned, described, tmp_path):
    code, _, err = tightfit("fleet", "plan", described, "-o", tmp_path / "profile.json")
    assert code == 2
    assert "is no folder that takes files" in err
    assert planned == {}


def test_the_help_shows_a_description_that_is_read(tightfit, tmp_path):
    """The example in the help is read as it stands there."""
    from tightfit.planner.fleet.description import read_description

    code, out, _ = tightfit("fleet", "plan", "--help")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    example = lines[lines.index("micro_batches = 16") :]
    save_profile(small_chain(3, layers=2), tmp_path / "laptop.json")
    (tmp_path / "fleet.toml").write_text("\n".join(example))
    found = read_description(tmp_path / "fleet.toml")
    (member,) = found.members
    assert (member.name, member.budget_bytes, found.count) == ("laptop", 320 * MIB, 16)
