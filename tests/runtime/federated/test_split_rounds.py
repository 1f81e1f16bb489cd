"""Split rounds on the server's side, over devices and runs that are made up: who is served when, what counts, what is
left out.
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from federated_fleets import tiny_split_fleet
from safetensors.numpy import load

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.tokenization import prepare
from tightfit.runtime.engine.training.records import RecordFile
from tightfit.runtime.federated import aggregate, service
from tightfit.runtime.federated.device import DeviceSettings, take_part
from tightfit.runtime.federated.messages import Answer, Order
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds import MOST_ASKED, Reply, Rounds
from tightfit.runtime.federated.rounds_folder import RoundsFolder
from tightfit.runtime.federated.split_stage import check_labels, labels_alone, stage_membership

SERVICE, TAIL = 5.0, 2.0
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    return tiny_split_fleet(folder, steps=6, speeds=(1e-5, 1e-3, 1e-3))


@pytest.fixture(scope="module")
def labels(planned, tmp_path_factory):
    profile = planned[2]
    shape = {"seq": profile.seq, "vocab_size": profile.model.config["vocab_size"]}
    return prepare("random", None, tmp_path_factory.mktemp("records"), **shape).path


class World:
    """Devices and the server's runs, on a clock of their own."""

    def __init__(self, names, labels, seq):
        self.names = sorted(names)
        self.labels, self.seq = labels.read_bytes(), seq
        self.there = dict.fromkeys(self.names, (0.0, 1e9))
        """from when until when each is connected"""
        self.refuses = {}
        """by member: how many of its orders it answers with an error"""
        self.breaks = {}
        """by member: how many of the server's runs for it end with an error"""
        self.breaks_late = {}
        """the same, of those that end so after the device has answered"""
        self.now, self.until = 0.0, 1e6
        self.hellos, self.orders, self.served, self.sent_labels = [], [], [], []
        self.waiting = {}
        self.ended = {}

    # --- the network

    def nodes(self):
        return {at for at, name in enumerate(self.names) if self.there[name][0] <= self.now < self.there[name][1]}

    def send(self, node, order, adapter):
        name = self.names[node]
        key = f"m{len(self.hellos) + len(self.orders)}"
        (self.orders if order.round else self.hellos).append((order.round, name, self.now))
        self.waiting[key] = name, order, adapter, self.now
        return key

    def replies(self, messages):
        found = [reply for reply in map(self.reply, messages) if reply]
        for reply in found:
            del self.waiting[reply.message]
        return found

    def reply(self, key):
        name, order, adapter, asked = self.waiting[key]
        if self.now >= self.there[name][1]:
            return Reply(message=key, answer=None, error="the node is gone")
        if not order.round:
            has = json.loads(order.labels)[name] != ""
            self.sent_labels.append((name, not has))
            return Reply(message=key, answer=Answer(round=0, member=name), adapter=b"" if has else self.labels)
        if self.refuses.get(name, 0) and self.now >= asked + 1.0:
            self.refuses[name] -= 1
            return Reply(message=key, answer=Answer(round=order.round, member=name, error="no room"))
        end = self.ended.get((order.round, name))
        if end is None or self.now < end + TAIL:
            return None
        return Reply(message=key, answer=answer_of(name, order), adapter=moved(adapter, name))

    # --- the server's runs

    def start(self, command, log):
        return Run(self, command, log)

    def sleep(self, seconds):
        self.now += seconds
        if self.now > self.until:
            raise TimeoutError


class Run:
    def __init__(self, world, command, log):
        self.world, self.command = world, command
        self.name = command[command.index("--member") + 1]
        self.round = int(command[command.index("--seed") + 1])
        self.out = Path(command[command.index("-o") + 1])
        self.begun, self.killed = world.now, False
        world.served.append((self.round, self.name, world.now))
        Path(log).write_text(json.dumps({"error": {"message": "it broke"}}))

    def poll(self):
        world = self.world
        if self.killed:
            return -15
        if world.now < self.begun + SERVICE:
            return None
        if world.breaks.get(self.name, 0):
            world.breaks[self.name] -= 1
            return 4
        if world.breaks_late.get(self.name, 0):
            world.ended.setdefault((self.round, self.name), world.now)
            if world.now < self.begun + SERVICE + 2 * TAIL:
                return None
            world.breaks_late[self.name] -= 1
            del world.ended[self.round, self.name]
            return 4
        given = Path(self.command[self.command.index("--adapter") + 1]) / WEIGHTS
        (self.out / "adapter").mkdir(parents=True, exist_ok=True)
        (self.out / "adapter" / WEIGHTS).write_bytes(moved(given.read_bytes(), self.name))
        (self.out / "report.json").write_text(json.dumps({"peak_bytes": {"measured": 7}}))
        world.ended[self.round, self.name] = world.now
        return 0

    def terminate(self):
        self.killed = True

    def wait(self, timeout=None):
        return -15


def answer_of(name, order):
    steps = order.steps_of(name)
    return Answer(round=order.round, member=name, steps=steps, tokens=100 * steps + ord(name), loss=1.0, peak_bytes=5)


def moved(adapter, name):
    """What training makes of a part of an adapter."""
    step = np.float32(0.01 * (ord(name) % 7 + 1))
    return aggregate.closed({key: (values + step).astype(np.float32) for key, values in load(adapter).items()})


@pytest.fixture
def world(planned, labels, monkeypatch):
    made = World(planned[0].names, labels, planned[2].seq)
    monkeypatch.setattr(service, "start", made.start)
    return made


def run(planned, out, world, rounds=2, **options):
    fleet, plans, _ = planned
    told = RoundOptions(rounds=rounds, fleet="folder", out=str(out), port=100, **options)
    said = []
    made = Rounds(fleet, plans, told, world, say=said.append, clock=lambda: world.now, sleep=world.sleep)
    return made, made.run(), RoundsFolder(out).lines()


def expected(made, rounds, taking="abc"):
    current = aggregate.opened(made._first(), made.shapes, 4, "it")
    for _ in range(rounds):
        parts = [
            aggregate.DeviceContribution(tensors=load(moved(aggregate.closed(current), name)), tokens=200 + ord(name))
            for name in made.members
            if name in taking
        ]
        current = aggregate.averaged(parts, current)
    return aggregate.closed(current)


@pytest.mark.slow
def test_devices_are_served_in_the_plans_order_one_at_a_time(planned, world, tmp_path):
    made, saved, lines = run(planned, tmp_path, world)
    order = planned[0].names
    assert [(number, name) for number, name, _ in world.served] == [(n, name) for n in (1, 2) for name in order]
    begins = [moment for _, _, moment in world.served]
    assert all(after >= before + SERVICE for before, after in itertools.pairwise(begins))
    assert saved.adapter == expected(made, 2)
    assert [line["left_out"] for line in lines] == [{}, {}]
    assert list(lines[0]["members"]) == order
    one = lines[0]["members"]["a"]
    assert one["server_peak_bytes"] == 7
    assert one["server_seconds"] == pytest.approx(SERVICE, abs=0.5)
    # All get their orders before the first is served, so that they are ready when their turn comes.
    assert max(moment for number, _, moment in world.orders if number == 1) <= begins[0]
    # Answers are on their way while the next device is served.
    assert begins[2] - begins[0] < 2 * SERVICE + TAIL


def test_each_part_goes_to_its_side(planned, world, tmp_path):
    made, _, _ = run(planned, tmp_path, world, rounds=1)
    for name in made.members:
        assert not made.lower[name].keys() & made.upper[name].keys()
        assert made.lower[name].keys() | made.upper[name].keys() == made.shapes.keys()
    assert len({len(made.lower[name]) for name in made.members}) == 2  # cuts differ
    given = load((tmp_path / "stages" / "a" / "given" / WEIGHTS).read_bytes())
    assert given.keys() == made.upper["a"].keys()


def test_labels_that_do_not_fit_are_not_taken(planned, labels, world, tmp_path):
    world.labels = labels.read_bytes()[:-4]
    world.until = 100.0
    with pytest.raises(TimeoutError):
        run(planned, tmp_path, world)
    assert len(world.hellos) == 3 * MOST_ASKED
    assert not (tmp_path / "labels").exists()
    assert not world.orders


def test_what_is_wrong_with_labels_is_told(planned, labels):
    plan, content = planned[1]["a"], labels.read_bytes()
    check_labels(content, plan, "they")
    with RecordFile.open(labels) as opened:
        last = slice(opened.header["index"] - 4, opened.header["index"])  # the last label of the last record
    beyond = bytearray(content)
    beyond[last] = (512).to_bytes(4, "little")
    before = bytearray(content)
    before[last] = (-7).to_bytes(4, "little", signed=True)
    for sent, message in (
        (b"nothing", "they: no record file, or a damaged one"),
        (content[:-4], "they: no record file, or a damaged one"),
        (
            content.replace(b'"vocab_size": 512', b'"vocab_size": 513'),
            r"vocabulary of \(24, 513\), the plan is for \(24, 512\)",
        ),
        (bytes(beyond), "they: no labels, or tokens that the model does not have"),
        (bytes(before), "they: no labels, or tokens that the model does not have"),
    ):
        with pytest.raises(InputError, match=message):
            check_labels(sent, plan, "they")


def test_labels_are_sent_once(planned, world, tmp_path):
    run(planned, tmp_path, world)
    assert sorted(world.sent_labels) == [("a", True), ("b", True), ("c", True)]
    world.sent_labels.clear()
    run(planned, tmp_path, world, rounds=3)
    assert sorted(world.sent_labels) == [("a", False), ("b", False), ("c", False)]


def test_one_that_is_not_there_is_waited_for_and_then_left_out(planned, world, tmp_path):
    first = planned[0].names[0]
    world.there[first] = (1e9, 1e9)
    made, saved, lines = run(planned, tmp_path, world, grace=8.0)
    assert [name for _, name, _ in world.served].count(first) == 0
    assert world.served[0][2] >= 8.0
    second = next(moment for number, _, moment in world.served if number == 2)
    last = next(moment for number, _, moment in reversed(world.served) if number == 1)
    assert second < last + SERVICE + TAIL + 2.0  # in the next round nobody waits for it
    assert [line["left_out"] for line in lines] == [{first: "it did not answer"}] * 2
    assert saved.adapter == expected(made, 2, set("abc") - {first})


def test_one_that_comes_late_is_served_when_it_comes(planned, world, tmp_path):
    first, second, third = planned[0].names
    world.there[first] = (11.0, 1e9)
    made, saved, lines = run(planned, tmp_path, world, rounds=1, grace=8.0)
    assert [name for _, name, _ in world.served] == [second, first, third]
    assert lines[0]["left_out"] == {}
    assert saved.adapter == expected(made, 1)


def test_a_part_that_fails_is_tried_again(planned, world, tmp_path):
    world.breaks["a"], world.refuses["b"] = 1, 1
    made, saved, lines = run(planned, tmp_path, world, rounds=1)
    assert saved.adapter == expected(made, 1)
    assert lines[0]["left_out"] == {}
    assert [name for _, name, _ in world.orders].count("b") == 2


def test_a_device_whose_other_half_is_lost_is_asked_again(planned, world, tmp_path):
    world.breaks_late["a"] = 1
    made, saved, lines = run(planned, tmp_path, world, rounds=1)
    assert saved.adapter == expected(made, 1)
    assert lines[0]["left_out"] == {}
    assert [name for _, name, _ in world.orders].count("a") == 2


def test_a_part_that_keeps_failing_is_left_out_and_says_why(planned, world, tmp_path):
    world.breaks["a"], world.refuses["b"] = 99, 99
    made, saved, lines = run(planned, tmp_path, world, rounds=1, grace=1.0)
    assert saved.adapter == expected(made, 1, "c")
    assert len([name for _, name, _ in world.served if name == "a"]) == MOST_ASKED
    assert lines[0]["left_out"]["a"] == "the server's run for it ended with code 4: it broke"
    assert lines[0]["left_out"]["b"] == "no room"


def test_a_device_that_goes_while_it_is_served_ends_the_servers_run(planned, world, tmp_path):
    first = planned[0].names[0]
    world.there[first] = (0.0, 3.0)
    made, saved, lines = run(planned, tmp_path, world, rounds=1, grace=1.0)
    assert world.served[1][2] < 3.0 + 1.0
    assert lines[0]["left_out"] == {first: "it gave no answer (the node is gone)"}
    assert saved.adapter == expected(made, 1, set("abc") - {first})


def test_it_goes_on_after_the_last_round(planned, world, tmp_path):
    run(planned, tmp_path, world, rounds=1)
    made, saved, lines = run(planned, tmp_path, world, rounds=2)
    assert [line["round"] for line in lines] == [1, 2]
    assert saved.adapter == expected(made, 2)


# --- the device's side ------------------------------------------------------------------------------------------------


@pytest.fixture
def device(labels, tmp_path):
    sent = tmp_path / "labels.records"
    labels_alone(labels, sent)
    return DeviceSettings(
        member="a",
        plan="a.plan.json",
        rank=4,
        data=str(labels),
        work=str(tmp_path / "work"),
        fleet="folder",
        labels=str(sent),
        server="here",
    )


def hello(**known):
    return Order(round=0, seconds=9.0, labels=json.dumps(known))


def test_a_device_says_who_it_is_and_sends_labels_that_are_not_known(device):
    assert DeviceSettings.read(device.write()) == device
    order = hello(a="")
    assert Order.of(order.words()) == order
    answer, sent = take_part(device, order, bytes)
    assert (answer.round, answer.member, answer.error) == (0, "a", "")
    assert sent == Path(device.labels).read_bytes()

    answer, again = take_part(device, hello(a=hashlib.sha256(sent).hexdigest()), bytes)
    assert not again
    Path(device.labels).unlink()
    assert "join again" in take_part(device, order, bytes)[0].error


def test_labels_are_the_records_without_their_inputs(device, labels):
    with RecordFile.open(labels) as whole, RecordFile.open(device.labels) as alone:
        assert alone.fingerprint == whole.fingerprint
        assert len(alone) == len(whole)
        for index in range(len(whole)):
            one = whole.read(index)
            wanted, length = one.labels.clone(), one.length
            assert int(one.input_ids.max()) > 0
            two = alone.read(index)
            assert two.labels.equal(wanted)
            assert two.length == length
            assert set(two.input_ids.tolist()) == {alone.pad_token}


def test_prepared_records_are_data(labels, planned, tmp_path):
    profile = planned[2]
    shape = {"seq": profile.seq, "vocab_size": profile.model.config["vocab_size"]}
    made = prepare(str(labels), None, tmp_path, **shape)
    assert made.path.read_bytes() == labels.read_bytes()
    with pytest.raises(InputError, match="prepared for sequences of 24 and a vocabulary of 512"):
        prepare(str(labels), None, tmp_path, **{**shape, "seq": 12})


def test_both_sides_have_a_seat(planned):
    fleet = planned[0]
    name = fleet.names[0]
    sides = [
        stage_membership(fleet, name, "here", 5, Path("fleet.key"), 9.0, server=server) for server in (False, True)
    ]
    assert [one.seat.rank for one in sides] == [0, 1]
    for one in sides:
        assert one.seat.listens == 1
        assert not one.seat.part.gathers
        assert (one.seat.address, one.seat.port, one.seat.timeout) == ("here", 5, 9.0)
        assert one.seat.members == [name, "server"]
        assert one.figures["exchange_seconds"] > 0
    assert sides[0].seat.part.above == sides[1].seat.part.below
