"""Federated rounds end to end: a real SuperLink and nodes on loopback, devices and servers that are killed. Needs
Flower.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from federated_fleets import needs_flower, tiny_fleet
from federating import RATE, WEIGHTS, adapter, adapter_of_rounds, ended, lines, processes, until

from tightfit.runtime.session.fleet import free_port

pytestmark = needs_flower


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    planned, plans = tiny_fleet(folder, steps=5, ranks=(4, 4), speeds=(1e-3, 1.4e-3), start=1.0)
    assert [replica.micro_batches for replica in planned.replicas] == [3, 2]
    return folder / "fleet", planned, plans


@pytest.fixture(scope="module")
def expected(fleet, tmp_path_factory):
    folder, _, plans = fleet
    devices = {name: (folder / f"{name}.plan.json", "random") for name in "ab"}
    return adapter_of_rounds(plans["a"], devices, {"a": 3, "b": 2}, tmp_path_factory.mktemp("expected"))


@pytest.fixture
def start(tmp_path):
    with processes(tmp_path) as started:
        yield started


@pytest.fixture
def serve(fleet, start, tmp_path):
    port = free_port()

    def serving(*words, rounds=2):
        options = ["--rounds", rounds, "-o", tmp_path / "out", "--lr", RATE, "--port", port, "--insecure"]
        return start("server", "run", fleet[0], *options, *words)

    serving.port = port
    return serving


@pytest.fixture
def join(fleet, start, serve, tmp_path):
    def joining(name, *words):
        options = ["--member", name, "--superlink", f"127.0.0.1:{serve.port}", "--data", "random", "--insecure"]
        return start(name, "join", fleet[0], *options, "-o", tmp_path / f"work-{name}", "--no-cgroup", *words)

    return joining


def test_two_devices_train_two_rounds(fleet, start, expected, tmp_path):
    """All on this machine, as for a trial."""
    options = [
        "--rounds",
        2,
        "-o",
        tmp_path / "out",
        "--lr",
        RATE,
        "--data",
        "random",
        "--min",
        2,
        "--no-cgroup",
        "--json",
    ]
    server = start("server", "run", fleet[0], *options)
    ended(server)
    assert adapter(tmp_path / "out") == expected
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(server.said().splitlines()[-1]) == report
    for number, line in enumerate(report["rounds"], 1):
        assert line["round"] == number
        assert line["left_out"] == {}
        assert line["tokens"] == 5 * 2 * 24
        for name, steps in (("a", 3), ("b", 2)):
            one = line["members"][name]
            assert one["steps"] == steps
            assert 60 << 20 < one["peak_bytes"] < 400 << 20
            # What is set aside for Flower is what it takes.
            assert one["flower_bytes"] <= fleet[1].members[0].aside_bytes
    again = start("server", "run", fleet[0], *options)
    assert again.process.wait(60) == 2
    assert "holds an earlier run; continue it with --resume" in again.said()


@pytest.mark.slow
def test_a_device_that_is_killed_comes_back(fleet, serve, join, expected, tmp_path):
    server = serve("--min", 2)
    one, other = join("a"), join("b")
    training = tmp_path / "work-b" / "run" / "metrics.jsonl"
    until(training.exists, server, one, other)
    other.kill()
    again = join("b")
    ended(server, one, again)
    assert adapter(tmp_path / "out") == expected
    assert all(line["left_out"] == {} for line in lines(tmp_path / "out"))


@pytest.mark.slow
def test_without_a_device_rounds_go_on(serve, join, tmp_path):
    server = serve("--min", 1, "--timeout", 40, "--grace", 5, rounds=2)
    one, other = join("a"), join("b")
    until((tmp_path / "work-b" / "given").exists, server, one, other)
    other.kill()
    ended(server, one)
    assert [list(line["members"]) for line in lines(tmp_path / "out")] == [["a"], ["a"]]
    assert set(lines(tmp_path / "out")[0]["left_out"]) == {"b"}


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on(serve, join, expected, tmp_path):
    """It is killed with everything that it started, once the first round is acknowledged; devices stay."""
    server = serve("--min", 2)
    one, other = join("a"), join("b")
    until(lambda: len(lines(tmp_path / "out")) == 1, server, one, other)
    server.kill()
    first = (tmp_path / "out" / "rounds" / "round-1" / WEIGHTS).read_bytes()
    until(lambda: not runs_of(tmp_path / "out"), server)
    again = serve("--min", 2, "--resume")
    ended(again, one, other)
    assert first == (tmp_path / "out" / "rounds" / "round-1" / WEIGHTS).read_bytes()
    assert adapter(tmp_path / "out") == expected
    assert [line["round"] for line in lines(tmp_path / "out")] == [1, 2]


@pytest.mark.slow
def test_rounds_whose_process_is_killed_go_on(serve, join, expected, tmp_path):
    """The process that Flower starts for the rounds; what started it notices, ends, and can be started again."""
    server = serve("--min", 2)
    one, other = join("a"), join("b")
    until(lambda: len(lines(tmp_path / "out")) == 1, server, one, other)
    os.kill(int((tmp_path / "out" / "server.pid").read_text()), signal.SIGKILL)
    until(lambda: server.process.poll() is not None, server)
    assert server.process.returncode == 4
    assert "the process of the rounds has ended" in server.said()
    again = serve("--min", 2, "--resume")
    ended(again, one, other)
    assert adapter(tmp_path / "out") == expected


def runs_of(folder):
    """Processes that were started with this folder in their command line or environment, but for this one's."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        if str(folder / "flower").encode() in words and int(path.name) != os.getpid():
            found.append(path.name)
    return found


@pytest.mark.slow
def test_tls_and_keys_are_passed_through(fleet, start, join, expected, tmp_path):
    """Only devices whose keys the server was given may join."""
    certificates(tmp_path)
    port = free_port()
    trust = ["--ssl-certfile", "s.crt", "--ssl-keyfile", "s.key", "--ssl-ca-certfile", "ca.crt"]
    files = [word if word[0] == "-" else tmp_path / word for word in trust]
    keys = [word for name in "ab" for word in ("--device-key", tmp_path / f"k{name}.pub")]
    options = ["--rounds", 2, "-o", tmp_path / "out", "--lr", RATE, "--min", 2, "--port", port]
    server = start("server", "run", fleet[0], *options, *files, *keys)

    def joined(name, key):
        own = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", tmp_path / "ca.crt"]
        own += ["--private-key", tmp_path / key, "--member", name, "--data", "random", "--no-cgroup"]
        return start(name, "join", fleet[0], *own, "-o", tmp_path / f"work-{key}")

    stranger, one, other = joined("a", "kc"), joined("a", "ka"), joined("b", "kb")
    ended(server, one, other)
    assert adapter(tmp_path / "out") == expected
    assert "does not know the key of this device; start it with --device-key" in stranger.said()
    for device in (one, other):
        assert device.process.wait(30) == 0
        assert "the rounds are over" in device.said()
    assert not (tmp_path / "work-kc" / "run").exists()


def certificates(folder):
    """An authority, a certificate of localhost that it signed, and three keys of devices."""
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for command in (
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=authority",
        "openssl req -newkey rsa:2048 -nodes -keyout s.key -out s.csr -subj /CN=localhost",
        "openssl x509 -req -in s.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out s.crt -days 2 -extfile names",
        *(f"ssh-keygen -q -t ecdsa -b 384 -N  -f k{name}" for name in "abc"),
    ):
        words = ["" if word == "''" else word for word in command.split(" ")]
        try:
            subprocess.run(words, cwd=folder, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip(f"{words[0]} is not installed")
