"""Split federated rounds end to end: a server and devices on loopback, against devices that hold all layers.

One test plays the network, so that it needs no Flower; runs of both sides are real in all of them.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from federated_fleets import needs_flower, tiny_split_fleet
from federating import LIMIT, RATE, adapter, adapter_of_rounds, ended, processes, until

from tightfit.planner.fleet.io import load_part_plan, plan_file
from tightfit.planner.io import save_plan
from tightfit.planner.plan import planner_of
from tightfit.profiles.schema import adamw
from tightfit.runtime.data.tokenization import prepare
from tightfit.runtime.federated.device import DeviceSettings, take_part
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds import Reply, Rounds
from tightfit.runtime.federated.split_stage import prepared_device
from tightfit.runtime.session.fleet import free_port


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Two devices that hold different numbers of layers."""
    folder = tmp_path_factory.mktemp("split")
    planned, _, profile = tiny_split_fleet(folder, start=1.0)
    assert [member.name for member in planned.members] == [*planned.names, "server"]
    devices = {replica.parts[0].member: replica for replica in planned.replicas}
    assert {name: (one.parts[0].layers, one.micro_batches) for name, one in devices.items()} == {
        "a": ([0, 3], 2),
        "b": ([0, 2], 2),
    }
    return folder / "fleet", planned, profile


@pytest.fixture(scope="module")
def data(fleet, tmp_path_factory):
    """A record file for each device, in a folder."""
    profile = fleet[2]
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate("ab"):
        shape = {"seq": profile.seq, "vocab_size": profile.model.config["vocab_size"]}
        prepare("random", None, folder / name, seed=seed, **shape).path.rename(folder / f"{name}.records")
    return folder


@pytest.fixture(scope="module")
def expected(fleet, data, tmp_path_factory):
    """The adapter after two rounds in which every device holds all layers, by running each and averaging."""
    _, planned, profile = fleet
    work = tmp_path_factory.mktemp("expected")
    plan = planner_of(profile.model_copy(update={"optimizer": adamw(1)})).plan(400 << 20)
    save_plan(plan, work / "whole.json")
    devices = {name: (work / "whole.json", data / f"{name}.records") for name in planned.names}
    return adapter_of_rounds(plan, devices, {name: planned.replica(name).micro_batches for name in planned.names}, work)


class Threads:
    """The devices as the server reaches them: each carries its orders out in a thread."""

    def __init__(self, devices):
        self.devices = devices
        self.pool = ThreadPoolExecutor(len(devices))
        self.under_way = {}

    def nodes(self):
        return set(range(len(self.devices)))

    def send(self, node, order, adapter):
        key = f"m{len(self.under_way)}"
        self.under_way[key] = self.pool.submit(take_part, self.devices[node], order, lambda: adapter)
        return key

    def replies(self, messages):
        done = [(key, self.under_way[key].result()) for key in messages if self.under_way[key].done()]
        return [Reply(message=key, answer=answer, adapter=trained) for key, (answer, trained) in done]


def test_rounds_are_those_of_devices_that_hold_all_layers(fleet, data, expected, tmp_path):
    folder, planned, _ = fleet
    plans = {part.plan: load_part_plan(folder, part) for part in planned.parts}
    assert set(plans) == {"a", "b", "server/a", "server/b"}
    devices = []
    for name in planned.names:
        work = str(tmp_path / f"work-{name}")
        path = str(folder / plan_file(name))
        device = DeviceSettings(
            member=name, plan=path, rank=4, data=str(data / f"{name}.records"), work=work, cgroup=False
        )
        devices.append(prepared_device(device, plans[name], str(folder), "127.0.0.1"))
    options = RoundOptions(
        rounds=2, fleet=str(folder), out=str(tmp_path / "out"), least=2, lr=RATE, port=0, cgroup=False, timeout=LIMIT
    )
    saved = Rounds(planned, plans, options, Threads(devices)).run()
    assert saved.adapter == expected
    assert saved.record["left_out"] == {}
    for replica in planned.replicas:
        lower, upper = replica.parts
        one = saved.record["members"][lower.member]
        assert one["peak_bytes"] <= lower.peak_bytes - planned.member(lower.member).aside_bytes
        assert one["server_peak_bytes"] <= upper.peak_bytes


@pytest.fixture
def start(tmp_path):
    with processes(tmp_path) as started:
        yield started


@pytest.mark.slow
@needs_flower
def test_the_adapter_is_that_of_devices_that_hold_all_layers(fleet, data, expected, start, tmp_path):
    out = tmp_path / "out"
    server = start(
        *("server", "run", fleet[0], "--rounds", 2, "-o", out, "--lr", RATE, "--min", 2, "--no-cgroup", "--json"),
        *("--data", f"{data}/{{member}}.records"),
    )
    ended(server)
    assert adapter(out) == expected
    report = json.loads((out / "report.json").read_text())
    assert json.loads(server.said().splitlines()[-1]) == report
    for number, line in enumerate(report["rounds"], 1):
        assert line["round"] == number
        assert line["left_out"] == {}
        assert line["tokens"] == 4 * 2 * 24
        for name in fleet[1].names:
            one = line["members"][name]
            assert one["steps"] == 2
            assert 60 << 20 < one["peak_bytes"] < 400 << 20
            assert 60 << 20 < one["server_peak_bytes"] < 400 << 20
            assert 0 < one["server_seconds"] < LIMIT
    # The server has labels, and no prompts.
    labels = (out / "labels" / "a.records").read_bytes()
    assert labels != (data / "a.records").read_bytes()
    assert len(labels) == (data / "a.records").stat().st_size


@pytest.fixture
def apart(fleet, data, start, tmp_path):
    """A server, and devices that join."""
    port, meet = free_port(), free_port()

    def serve(*words):
        trust = ["--port", port, "--insecure", "--meet", f"127.0.0.1:{meet}"]
        options = ["--rounds", 2, "-o", tmp_path / "out", "--lr", RATE, "--no-cgroup"]
        return start("server", "run", fleet[0], *options, *trust, *words)

    def join(name):
        options = [
            "--member",
            name,
            "--superlink",
            f"127.0.0.1:{port}",
            "--data",
            data / f"{name}.records",
            "--insecure",
        ]
        return start(name, "join", fleet[0], *options, "-o", tmp_path / f"work-{name}", "--no-cgroup")

    return serve, join


@pytest.mark.slow
@needs_flower
def test_a_device_that_is_killed_while_it_is_served_is_left_out_and_comes_back(apart, expected, tmp_path):
    serve, join = apart
    server, one, other = serve("--min", 2), join("a"), join("b")
    training = tmp_path / "work-b" / "run" / "metrics.jsonl"
    until(training.exists, server, one, other)
    other.kill()
    again = join("b")
    ended(server, one, again)
    assert adapter(tmp_path / "out") == expected
