"""The process of a device, over a server that is made up: when it goes on asking, and when it ends."""

from types import SimpleNamespace

import pytest

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.federated import node
from tightfit.runtime.federated.device import DeviceSettings, take_part
from tightfit.runtime.federated.fleet_api import Endpoint, RefusedError, UnreachableError
from tightfit.runtime.federated.messages import OVER, Answer, Order

DEVICE = DeviceSettings(member="a", plan="a.plan.json", rank=4, data="random", work="work")
OVER_ORDER = Order(round=OVER, seconds=5.0)


class Server:
    """What a node reaches; `says` are the errors with which it answers one request to join after the other, "" for
    none.
    """

    endpoint = Endpoint(host="server", port=9092)

    def __init__(self, says, *, registered=True, messages=()):
        self.says, self.registered, self.messages = list(says), registered, list(messages)
        self.pushed, self.left, self.asked = [], False, 0

    def join(self):
        self.asked += 1
        error = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if error:
            raise error

    def message(self):
        return self.messages.pop(0)

    def push(self, incoming, name, words, trained):
        self.pushed.append(Answer.of(words))

    def alive(self):
        return True

    def leave(self):
        self.left = True


def incoming(order):
    return SimpleNamespace(words=lambda name: order.words(), confirm=lambda: None, adapter=lambda: b"")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(node, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(node, "STRANGE_SECONDS", 0.2)


@pytest.mark.parametrize("status", node.STRANGE)
@pytest.mark.parametrize("registered", [True, False])
def test_a_device_whose_key_the_server_does_not_know_ends_and_says_so(capsys, status, registered):
    server = Server([RefusedError("activate-node", status, "raw")], registered=registered)
    with pytest.raises(InputError, match="--device-key" if registered else "--private-key"):
        node.Node(DEVICE, server).serve()
    assert server.asked > 1
    said = capsys.readouterr().err
    assert "the server at server:9092" in said
    assert "raw" not in said


def test_a_device_that_was_not_let_in_does_not_look_for_a_server_that_has_gone_for_ever():
    refused, gone = RefusedError("activate-node", 412, "raw"), UnreachableError("server:9092: no SuperLink answers")
    with pytest.raises(InputError, match="--device-key"):
        node.Node(DEVICE, Server([gone, refused, gone])).serve()


def test_a_server_may_learn_the_key_after_it_has_started(capsys):
    refused, gone = RefusedError("activate-node", 412, "raw"), UnreachableError("server:9092: no SuperLink answers")
    server = Server([gone, refused, refused, ""], messages=[incoming(OVER_ORDER)])
    with pytest.raises(SystemExit) as ended:
        node.Node(DEVICE, server).serve()
    assert ended.value.code == 0
    assert [(one.round, one.member, one.error) for one in server.pushed] == [(OVER, "a", "")]
    assert server.left
    assert capsys.readouterr().err.endswith("tightfit: a: the rounds are over\n")


def test_flowers_own_node_answers_that_the_rounds_are_over():
    answer, trained = take_part(DEVICE, OVER_ORDER, lambda: b"")
    assert (answer.round, answer.error, trained) == (OVER, "", b"")


@pytest.mark.parametrize("deaf", [set(), {2}])
def test_all_devices_that_are_there_are_told(monkeypatch, deaf):
    server_app = pytest.importorskip("tightfit.runtime.federated.server_app", exc_type=ImportError)
    monkeypatch.setattr(server_app, "OVER_SECONDS", 0.5)
    told = []

    class Network:
        def nodes(self):
            return {1, 2, 3}

        def send(self, to, order, adapter):
            told.append((to, order.round))
            return f"m{to}"

        def replies(self, messages):
            return [SimpleNamespace(message=one) for one in messages if int(one[1:]) not in deaf]

    server_app.tell_over(Network())
    assert told == [(1, OVER), (2, OVER), (3, OVER)]
