"""The server's rounds over devices that are made up: who is asked, who counts, and what a killed server goes on
with.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from federated_fleets import tiny_fleet
from safetensors.numpy import load

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.federated.adapter_file import AdapterFile
from tightfit.runtime.federated.aggregate import DeviceContribution, averaged, closed, opened, singular_form
from tightfit.runtime.federated.messages import Answer, Order
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds import MOST_ASKED, Reply, Rounds
from tightfit.runtime.federated.rounds_folder import RoundsFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def planned(folder):
    return tiny_fleet(folder, steps=6, ranks=(4, 4, 4), speeds=(1e-3, 1e-3, 1e-3), start=1.0)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return tiny_fleet(folder, steps=6, ranks=(4, 2), speeds=(1e-3, 1e-3), start=1.0)


class Devices:
    """Devices on a clock of their own. `comes`: seconds from an order to its answer by member; None: never."""

    def __init__(self, comes, ranks=None, there=None):
        self.comes = comes
        self.ranks = ranks or {}
        self.there = there or dict.fromkeys(comes, (0.0, 1e9))
        """from when until when each is connected"""
        self.now = 0.0
        self.sent, self.greeted = [], []
        self.waiting = {}
        self.bad = {}
        """by member: what it answers instead"""

    def nodes(self):
        names = sorted(self.comes)
        return {at for at, name in enumerate(names) if self.there[name][0] <= self.now < self.there[name][1]}

    def send(self, node, order, adapter):
        name = sorted(self.comes)[node]
        (self.sent if order.round else self.greeted).append((order.round, name, self.now))
        key = f"m{len(self.sent) + len(self.greeted)}"
        self.waiting[key] = (name, order, adapter, self.now)
        return key

    def replies(self, messages):
        result = []
        for key in messages:
            name, order, adapter, asked = self.waiting[key]
            gone = self.there[name][1]
            if asked < gone <= self.now:
                result.append(Reply(message=key, answer=None, error="the node is gone"))
            elif not order.round:
                result.append(Reply(message=key, answer=Answer(round=0, member=name)))
            elif self.comes[name] is not None and self.now >= asked + self.comes[name]:
                result.append(self.reply(key, name, order, adapter))
        for reply in result:
            del self.waiting[reply.message]
        return result

    def reply(self, key, name, order, adapter):
        if name in self.bad:
            return self.bad[name](key, name, order, adapter)
        return Reply(
            message=key, answer=answer_of(name, order), adapter=trained(name, order, adapter, self.ranks.get(name))
        )

    def sleep(self, seconds):
        self.now += seconds


def answer_of(name, order, **changes):
    steps = order.steps_of(name)
    told = Answer(round=order.round, member=name, steps=steps, tokens=100 * steps + ord(name), loss=1.0 / order.round)
    return replace(told, **changes)


def trained(name, order, adapter, rank=None):
    """What a device makes of an adapter: each value moved by something of the device's own."""
    content = AdapterFile.read(adapter, "it").cut(rank) if rank else adapter
    moved = (ord(name) % 7 + 1) * 0.01 * order.round
    return closed({key: (values + np.float32(moved)).astype(np.float32) for key, values in load(content).items()})


def run(planned, folder, out, devices, rounds=2, **options):
    fleet, plans = planned
    said = []
    told = RoundOptions(rounds=rounds, fleet=str(folder), out=str(out), **options)
    made = Rounds(fleet, plans, told, devices, say=said.append, clock=lambda: devices.now, sleep=devices.sleep)
    saved = made.run()
    return SimpleNamespace(made=made, saved=saved, said=said, lines=RoundsFolder(out).lines())


def expected(planned, rounds, taking="abc"):
    """The adapter after so many rounds, by the formula."""
    fleet, plans = planned
    one = Rounds(fleet, plans, RoundOptions(rounds=9, fleet="", out="/nonexistent"), None)
    current = opened(one._first(), one.shapes, 4, "it")
    steps = json.dumps({name: fleet.replica(name).micro_batches for name in fleet.names})
    for number in range(1, rounds + 1):
        order = Order(round=number, steps=steps, lr=0.0, weight_decay=0.0, seed=0, seconds=1.0)
        parts = [
            DeviceContribution(
                tensors=load(trained(name, order, closed(current))), tokens=answer_of(name, order).tokens
            )
            for name in taking
        ]
        current = averaged(parts, current)
    return closed(current)


def test_rounds_are_the_weighted_means(planned, folder, tmp_path):
    devices = Devices({"a": 5.0, "b": 3.0, "c": 9.0})
    found = run(planned, folder, tmp_path, devices)
    assert found.saved.adapter == expected(planned, 2)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == found.saved.adapter
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert [line["round"] for line in found.lines] == [1, 2]
    assert found.lines[0]["left_out"] == {}
    assert found.lines[0]["tokens"] == sum(one["tokens"] for one in found.lines[0]["members"].values())
    assert (len(devices.greeted), len(devices.sent)) == (3, 6)


def test_the_order_of_answers_does_not_matter(planned, folder, tmp_path):
    one = run(planned, folder, tmp_path / "1", Devices({"a": 1.0, "b": 2.0, "c": 3.0}))
    other = run(planned, folder, tmp_path / "2", Devices({"a": 3.0, "b": 2.0, "c": 1.0}))
    assert one.saved.adapter == other.saved.adapter


def test_a_device_that_does_not_answer_is_left_out(planned, folder, tmp_path):
    devices = Devices({"a": 5.0, "b": None, "c": 9.0})
    found = run(planned, folder, tmp_path, devices, rounds=1, least=2, timeout=40.0)
    assert found.saved.adapter == expected(planned, 1, "ac")
    assert found.lines[0]["left_out"] == {"b": "it did not answer"}
    assert found.lines[0]["seconds"] == pytest.approx(40.0, abs=2.0)


def test_a_device_that_is_not_there_is_waited_for_in_the_grace_only(planned, folder, tmp_path):
    devices = Devices({"a": 5.0, "b": 1.0, "c": 9.0}, there={"a": (0, 1e9), "b": (1e6, 1e9), "c": (0, 1e9)})
    found = run(planned, folder, tmp_path, devices, rounds=1, timeout=1000.0, grace=20.0)
    assert list(found.lines[0]["members"]) == ["a", "c"]
    assert found.lines[0]["seconds"] == pytest.approx(20.0, abs=2.0)


def test_a_device_that_comes_back_gets_the_rounds_adapter(planned, folder, tmp_path):
    """It goes in the first round before it has answered, and is there again later in the same round."""
    devices = Devices({"a": 5.0, "b": 8.0, "c": 20.0}, there={"a": (0, 1e9), "b": (0, 4.0), "c": (0, 1e9)})

    def sleep(seconds):
        devices.now += seconds
        if devices.now >= 10.0:
            devices.there["b"] = (10.0, 1e9)

    devices.sleep = sleep
    found = run(planned, folder, tmp_path, devices, rounds=1, least=3, timeout=100.0)
    assert found.saved.adapter == expected(planned, 1)
    assert [at for _, name, at in devices.sent if name == "b"] == [0.0, 10.0]
    assert any("gave no answer (the node is gone)" in line for line in found.said)


def test_a_device_that_is_started_again_is_asked_at_once(planned, folder, tmp_path):
    """It is there as another node before the server knows that the first one is gone."""

    class Restarted(Devices):
        def nodes(self):
            return {*super().nodes(), *({7} if self.now >= 6.0 else set())}

        def send(self, node, order, adapter):
            if node == 7:
                self.comes["b"] = 2.0
            return super().send(1 if node == 7 else node, order, adapter)

    devices = Restarted({"a": 5.0, "b": None, "c": 9.0})
    found = run(planned, folder, tmp_path, devices, rounds=1, least=3, timeout=100.0)
    assert found.saved.adapter == expected(planned, 1)
    assert [at for _, name, at in devices.sent if name == "b"] == [0.0, 6.0]


def test_a_device_that_is_strange_is_not_asked_for_ever(planned, folder, tmp_path):
    class Strange(Devices):
        def replies(self, messages):
            found = super().replies([key for key in messages if self.waiting[key][0] != "z"])
            other = [key for key in messages if key in self.waiting and self.waiting[key][0] == "z"]
            return found + [Reply(message=key, answer=Answer(round=0, member="z")) for key in other]

    devices = Strange({"a": 5.0, "b": 3.0, "c": 9.0, "z": None})
    found = run(planned, folder, tmp_path, devices, rounds=1)
    assert found.saved.adapter == expected(planned, 1)
    assert [name for _, name, _ in devices.greeted].count("z") == MOST_ASKED
    assert "node 3: member 'z' takes no part" in found.said


def test_too_few_answers_are_waited_for(planned, folder, tmp_path):
    devices = Devices({"a": 5.0, "b": None, "c": None})

    def sleep(seconds):
        devices.now += seconds
        if devices.now > 60.0:
            devices.comes["b"] = 2.0

    devices.sleep = sleep
    found = run(planned, folder, tmp_path, devices, rounds=1, least=2, timeout=40.0)
    assert found.saved.adapter == expected(planned, 1, "ab")
    assert any("1 answers in 40 s are too few" in line for line in found.said)


def _with(**changes):
    def reply(key, name, order, adapter):
        return Reply(message=key, answer=answer_of(name, order, **changes), adapter=trained(name, order, adapter))

    return reply


def _damaged(key, name, order, adapter):
    return Reply(message=key, answer=answer_of(name, order), adapter=adapter[:-8])


def _infinite(key, name, order, adapter):
    tensors = {key: values.copy() for key, values in load(adapter).items()}
    next(iter(tensors.values()))[0, 0] = np.inf
    return Reply(message=key, answer=answer_of(name, order), adapter=closed(tensors))


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (_with(error="the disk is full"), "the disk is full"),
        (_with(round=7), "it answered for b in round 7"),
        (_with(member="a"), "it answered for a in round 1"),
        (_with(member="zzz"), "it answered for zzz in round 1"),
        (_damaged, "the answer of b: an adapter that is cut off"),
        (_infinite, "holds values that are no finite numbers"),
    ],
)
def test_an_answer_that_cannot_be_used_is_left_out(planned, folder, tmp_path, answers, why):
    devices = Devices({"a": 1.0, "b": 5.0, "c": 9.0})
    devices.bad["b"] = answers
    found = run(planned, folder, tmp_path, devices, rounds=1, grace=12.0)
    assert found.saved.adapter == expected(planned, 1, "ac")
    assert why in found.lines[0]["left_out"]["b"]
    assert [name for _, name, _ in devices.sent] == ["a", "b", "c"]  # it would go wrong again


def test_a_server_that_was_killed_goes_on_after_the_last_round(planned, folder, tmp_path):
    run(planned, folder, tmp_path, Devices({"a": 5.0, "b": 3.0, "c": 9.0}), rounds=2)
    (tmp_path / "rounds" / ".round-3.part").mkdir()  # it was killed while it saved the next one
    (tmp_path / "rounds.jsonl").write_text((tmp_path / "rounds.jsonl").read_text().splitlines()[0] + "\n")
    found = run(planned, folder, tmp_path, Devices({"a": 5.0, "b": 3.0, "c": 9.0}), rounds=4)
    assert found.said[0] == "going on after round 2"
    assert found.saved.adapter == expected(planned, 4)
    assert [line["round"] for line in found.lines] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "rounds").iterdir() if path.name[0] != ".") == [
        "round-3",
        "round-4",
    ]


def test_rounds_of_another_kind_are_not_continued(planned, folder, tmp_path):
    run(planned, folder, tmp_path, Devices({"a": 5.0, "b": 3.0, "c": 9.0}), rounds=1)
    with pytest.raises(InputError, match=r"made under other conditions \(seed 0, now 3\)"):
        run(planned, folder, tmp_path, Devices({}), rounds=2, seed=3)
    (tmp_path / "rounds" / "round-1" / "round.json").write_text("{")
    with pytest.raises(InputError, match=r"damaged .*remove this folder"):
        run(planned, folder, tmp_path, Devices({}), rounds=2)


def test_a_run_may_start_from_an_adapter(planned, folder, tmp_path):
    run(planned, folder, tmp_path / "1", Devices({"a": 5.0, "b": 3.0, "c": 9.0}), rounds=1)
    options = {"rounds": 1, "adapter": str(tmp_path / "1" / "adapter")}
    found = run(planned, folder, tmp_path / "2", Devices({"a": 5.0, "b": 3.0, "c": 9.0}), **options)
    first = (tmp_path / "2" / "rounds" / "round-0" / "adapter_model.safetensors").read_bytes()
    assert first == (tmp_path / "1" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert found.saved.adapter != first
    with pytest.raises(InputError, match="No such file or directory; give the folder of an adapter"):
        run(planned, folder, tmp_path / "3", Devices({}), rounds=1, adapter=str(tmp_path))


def test_ranks_that_differ_meet_in_the_singular_form(mixed, folder, tmp_path):
    fleet, _ = mixed
    assert [replica.rank for replica in fleet.replicas] == [4, 2]
    devices = Devices({"a": 5.0, "b": 3.0}, ranks={"b": 2})
    found = run(mixed, folder, tmp_path, devices, rounds=2)
    first = found.made
    current = opened(first._first(), first.shapes, 4, "it")
    steps = json.dumps({name: fleet.replica(name).micro_batches for name in fleet.names})
    for number in (1, 2):
        current = singular_form(current)
        order = Order(round=number, steps=steps, lr=0.0, weight_decay=0.0, seed=0, seconds=1.0)
        parts = [
            DeviceContribution(
                tensors=load(trained(name, order, closed(current), rank)), tokens=answer_of(name, order).tokens
            )
            for name, rank in (("a", 4), ("b", 2))
        ]
        current = averaged(parts, current)
    assert found.saved.adapter == closed(current)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.853553, 0.5, 0.146447])],
)
def test_the_rate_falls_over_the_rounds(schedule, rates):
    options = RoundOptions(rounds=4, fleet="", out="", lr=2.0, schedule=schedule)
    assert [options.rate(number) for number in (1, 2, 3, 4)] == pytest.approx([2 * rate for rate in rates], abs=1e-5)


def test_what_is_left_behind_is_cleared(planned, folder, tmp_path):
    run(planned, folder, tmp_path, Devices({"a": 5.0, "b": 3.0, "c": 9.0}), rounds=1)
    (tmp_path / "mine").write_text("kept")
    RoundsFolder(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    shutil.rmtree(tmp_path)
