"""Messages between training processes: what they take, who may send any, and what members are told of one that ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch

from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.common.interpreter import python_path
from tightfit.runtime.engine.fleet import meeting as meetings
from tightfit.runtime.engine.fleet.keys import Keys, new_pairs, read_keys
from tightfit.runtime.engine.fleet.meeting import listening
from tightfit.runtime.engine.fleet.transport import Transport
from tightfit.runtime.engine.start.process import child_environment
from tightfit.runtime.session.fleet import free_port

NAMES = [*"abcdefgh", "first", "second", "third"]
PAIRS, OTHER_PAIRS = new_pairs(NAMES), new_pairs(NAMES)
"""the keys of a fleet, and of another one"""
MEET = """
import hashlib, json, os, signal, sys, time
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import lean_torch
lean_torch.load()
import torch
from tightfit.runtime.common.errors import TightfitError
rank, port, names, pairs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), json.loads(sys.argv[6])
asked = []
torch.ones(1 << 16)
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
open("/proc/self/clear_refs", "w").write("5")
begun, before, said = time.monotonic(), memory().resident, []
from tightfit.runtime.engine.fleet.keys import Keys
from tightfit.runtime.engine.fleet.transport import Transport
keys = Keys.of(pairs, names, rank)
try:
    meeting = Transport(
        names, rank, "127.0.0.1", port, keys=keys, timeout=float(sys.argv[4]), stopping=lambda: bool(asked), say=said.append
    )
    added = memory().resident - before
    exec(sys.argv[5])
except TightfitError as error:
    told = {"error": str(error), "seconds": time.monotonic() - begun, "peak": memory().peak - before, "said": said}
    print(json.dumps(told), flush=True)
    if "meeting" in globals():
        meeting.hang_up()
"""


def keys_of(names, rank, pairs=PAIRS):
    """The keys of one of some members."""
    return Keys.of(pairs, names, rank)


def started(rank, port, names, timeout, part):
    """A member in a process of its own, as a training process is one."""
    environment = child_environment(1) | {"PYTHONPATH": python_path()}
    words = [sys.executable, "-P", "-c", MEET, *map(str, (rank, port, names, timeout, part, json.dumps(PAIRS)))]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(members):
    """What each member's process says in the end."""
    said = {rank: member.communicate(timeout=60) for rank, member in members.items()}
    assert all(not errors or "Traceback" not in errors for _, errors in said.values()), said
    return {rank: json.loads(words) if words.strip() else None for rank, (words, _) in said.items()}


def in_threads(does):
    """What each of these returns, or the error that it raises and after how long, by rank; all at once."""
    told = {}

    def one(rank, work):
        begun = time.monotonic()
        try:
            told[rank] = work(rank)
        except TightfitError as error:
            told[rank] = {"error": str(error), "seconds": time.monotonic() - begun}

    members = [threading.Thread(target=one, args=item) for item in does.items()]
    for member in members:
        member.start()
    for member in members:
        member.join()
    return told


def met(names="abc", timeout=3.0, ranks=None, pairs=None, port=None, say=lambda text: None):
    """Members of a fleet that have met, by rank, or what the error says; `ranks`: those that come at all."""
    port = port or free_port(count=len(names))
    return in_threads(
        {
            rank: lambda rank: Transport(
                list(names),
                rank,
                "127.0.0.1",
                port,
                keys=keys_of(names, rank, (pairs or {}).get(rank, PAIRS)),
                timeout=timeout,
                say=say,
            )
            for rank in (range(len(names)) if ranks is None else ranks)
        }
    )


def test_bytes_pass_in_parts():
    members, content = met("ab"), bytes(range(256)) * 5
    parts = [content[at : at + 500] for at in range(0, len(content), 500)]

    def receive(rank):
        return [bytes(part) for part in members[rank].receive_parts(len(content), 0, 500)]

    assert in_threads({0: lambda rank: members[rank].send_parts(parts, 1), 1: receive})[1] == parts
    for member in members.values():
        member.hang_up()


def waiting(members, does=None):
    """What each member is told that waits for its neighbour, or does something else."""
    count = len(members)
    waits = {rank: lambda rank: members[rank].receive_json((rank + 1) % count) for rank in members}
    told = in_threads(waits | (does or {}))
    for member in members.values():
        member.hang_up()
    return told


@pytest.mark.slow
def test_it_takes_little_memory():
    """ZeroMQ is imported, one end is open. gloo took 7 MiB, a process with all of `torch.distributed` more than 60."""
    port, end = free_port(), "print(json.dumps({'added': memory().resident - before}))"
    does = ("meeting.send(torch.ones(1 << 16), 1).wait()", "meeting.receive(torch.empty(1 << 16), 0).wait()")
    told = answers({rank: started(rank, port, "a,b", 20, f"{one}; {end}") for rank, one in enumerate(does)})
    assert all(one["added"] < 12 << 20 for one in told.values()), told


def test_members_exchange_tensors_and_what_json_holds():
    """All with each other, messages that are larger than what the system keeps under way, in both directions at
    once.
    """
    members, size = met("abcd", 20.0), 1 << 20

    def talk(rank):
        others = [one for one in members if one != rank]
        rooms = {one: torch.empty(size) for one in others}
        coming = [members[rank].receive(room, one) for one, room in rooms.items()]
        going = [members[rank].send(torch.full((size,), 10.0 * rank + one), one) for one in others]
        for one in coming + going:
            one.wait()
        for one in others:
            members[rank].send_json({"from": rank}, one)
        told = [members[rank].receive_json(one) for one in others]
        return others, [[room[0].item(), room.mean().item()] for room in rooms.values()], told

    for rank, (others, values, told) in waiting(members, dict.fromkeys(range(4), talk)).items():
        assert values == [[10.0 * one + rank] * 2 for one in others]
        assert told == [{"from": one} for one in others]


def test_what_a_member_sent_before_its_run_was_over_is_received_after_it_has_gone():
    members = met("abc")
    for one in (0, 2):
        for value in range(3):
            members[one].send(torch.full((4,), float(value)), 1).wait()
        members[one].close()
    members[1]._living.join(1.0)  # time enough to hear that both have ended
    for one in (0, 2):
        assert all(members[1]._peers[other].ended for other in (0, 2))
        for value in range(3):
            room = torch.empty(4)
            members[1].receive(room, one).wait()
            assert room.tolist() == [value] * 4
        with pytest.raises(RunError, match=rf"member '{'abc'[one]}' of the fleet has ended without a word"):
            members[1].receive(torch.empty(1), one).wait()
        members[1]._verdict = None
    members[1].hang_up()
    members[1]._living.join(5.0)
    assert not members[1]._living.is_alive()


def test_members_that_are_out_of_step_are_told():
    members = met("ab")
    told = waiting(members, {0: lambda _: members[0].send(torch.ones(3), 1).wait()})
    assert "member 'a' has sent 12 bytes of kind 0 where None of kind 1 are due" in told[1]["error"]


# --- who ends, and who is told what -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_member_that_dies_is_named_by_all_the_others():
    """Only a neighbour of the dead member waits for it."""
    port, names = free_port(count=3), "first,second,third"
    does = dict.fromkeys(range(3), "meeting.receive(torch.empty(1), (rank + 1) % 3).wait()")
    does[1] = "time.sleep(0.5); os._exit(9)"
    told = answers({rank: started(rank, port, names, 20, part) for rank, part in does.items()})
    for rank in (0, 2):
        assert told[rank]["error"].startswith("member 'second' of the fleet has ended"), told


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_why_a_member_leaves_is_said_by_it(leaves):
    members = met()
    told = waiting(members, {leaves: lambda _: members[leaves].leave("has ended: no disk")})
    for rank in {0, 1, 2} - {leaves}:
        assert told[rank]["error"] == f"member '{'abc'[leaves]}' of the fleet has ended: no disk"


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_member_that_is_silent_is_named_by_those_that_wait_for_one_that_waits_for_it(slow):
    """It gives signs of life, and sends nothing: a neighbour that waits for it is well."""
    told = waiting(met(timeout=1.5), {slow: lambda _: time.sleep(5)})
    for rank in {0, 1, 2} - {slow}:
        assert told[rank]["error"].startswith(f"member '{'abc'[slow]}' of the fleet did not answer for 2 s"), told
        assert told[rank]["seconds"] < 5


@pytest.mark.slow_but_for("1")
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_where_the_network_is_cut_members_that_are_well_are_not_blamed(cut):
    members = met()
    lose(members, [(cut, other) for other in range(3) if other != cut])
    told = waiting(members)
    for rank in {0, 1, 2} - {cut}:
        assert told[rank]["error"].startswith(f"member '{'abc'[cut]}' of the fleet is out of reach of "), told
    assert f"it is '{'abc'[cut]}', this one, that is cut off" in told[cut]["error"]
    # Each ends within its timeout, and two signs of life more.
    assert all(one["seconds"] < 3 + 3 for one in told.values()), told


@pytest.mark.slow
def test_where_one_link_is_cut_the_third_member_says_so():
    members = met()
    lose(members, [(0, 1)])
    told = waiting(members)
    assert "'c' hears both, so that it is the network" in told[2]["error"], told
    assert all("cut off" not in one["error"] for one in told.values()), told


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (0, 2)])
def test_where_one_link_is_cut_nobody_blames_the_member_that_reaches_both(pair):
    """Its verdict is passed on before it ends: who found out cannot tell the one that it does not reach."""
    members = met()
    members[pair[1]].timeout -= 0.8  # it finds out before the other
    lose(members, [pair])

    def ends_at_once(rank):
        try:
            members[rank].receive_json((rank + 1) % 3)
        finally:
            members[rank].hang_up()

    told = in_threads(dict.fromkeys(range(3), ends_at_once))
    lost, reached = ("abc"[rank] for rank in pair)
    for one in told.values():
        named = re.match(r"member '(.)' of the fleet is out of reach of '(.)': nothing has come for ", one["error"])
        assert named, told
        assert {*named.groups()} == {lost, reached}


@pytest.mark.slow
def test_who_ends_after_a_long_silence_is_not_said_to_have_ended_alone():
    """Its last words may have been lost, though the end of the connection was not."""
    members = met(timeout=6.0)
    for rank in (0, 2):
        members[rank]._peers[1].link = Lossy(members[rank]._peers[1].link)

    def ends(rank):
        time.sleep(3.0)
        members[rank].hang_up()  # waits in vain for who does not hear it

    told = in_threads({0: ends, 1: lambda _: members[1].receive_json(2), 2: lambda _: time.sleep(7.0)})
    for member in members.values():
        member.hang_up()
    assert re.search(
        r"^member 'a' of the fleet has ended without a word, after [45] s in which nothing came from it",
        told[1]["error"],
    )


def lose(members, pairs):
    """Lose what passes between some members from now on; their connections stay."""
    for pair in pairs:
        for rank, other in (pair, pair[::-1]):
            peer = members[rank]._peers[other]
            peer.link = Lossy(peer.link)


class Lossy:
    """A connection over a network that is cut: what is sent is lost."""

    def __init__(self, connection):
        self.connection = connection

    def send(self, data, flags=0):
        pass

    def __getattr__(self, name):
        return getattr(self.connection, name)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["met", "waiting"])
def test_a_member_that_waits_ends_on_sigterm(when):
    """Also where the other one stands still, or has never come."""
    port, rank = free_port(), int(when == "met")
    one = started(rank, port, "a,b", 600, "print('here', flush=True); meeting.receive_json(1 - rank)")
    other = None
    if when == "met":
        other = started(1 - rank, port, "a,b", 600, "os.kill(os.getpid(), signal.SIGSTOP)")
        assert one.stdout.readline() == "here\n"
        time.sleep(7)  # three signs of life are missing
    else:
        time.sleep(4)
    one.send_signal(signal.SIGTERM)
    told = answers({rank: one})[rank]
    assert ("was asked to end" if when == "met" else "interrupted while waiting") in told["error"]
    if other:
        other.kill()
        other.communicate()


# --- the meeting ------------------------------------------------------------------------------------------------------


@pytest.mark.slow_but_for("1")
@pytest.mark.parametrize("absent", [0, 1, 2])
def test_who_does_not_come_is_named_by_all_the_others(absent):
    told = met(timeout=2.0, ranks={0, 1, 2} - {absent})
    for one in told.values():
        others = one["error"].replace("(a, b, c)", "").replace("with an address of 'a'", "")
        assert f"'{'abc'[absent]}'" in others, told
        assert "start all 3 members (a, b, c)" in one["error"]


@pytest.mark.parametrize(("rank", "awaited"), [(0, "waiting for 'b', "), (1, "waiting for 'a', ")])
def test_who_is_waited_for_is_said_while_it_is(monkeypatch, rank, awaited):
    monkeypatch.setattr(meetings, "SAY_SECONDS", 0.3)
    said = []
    with pytest.raises(RunError):
        Transport(["a", "b"], rank, "127.0.0.1", free_port(), keys=keys_of("ab", rank), timeout=1.0, say=said.append)
    assert len(said) >= 2
    assert all(one.startswith(awaited) for one in said)


def test_the_member_that_listens_needs_an_address_of_its_own():
    with pytest.raises(
        InputError, match=r"203\.0\.113\.7 is no address of this machine: member 'a', this one, listens"
    ):
        Transport(["a", "b"], 0, "203.0.113.7", 29400, keys=keys_of("ab", 0), timeout=60.0)
    with listening("127.0.0.1", 0) as taken, pytest.raises(InputError, match="give another port"):
        Transport(["a", "b"], 0, "127.0.0.1", taken.getsockname()[1], keys=keys_of("ab", 0), timeout=60.0)
    with pytest.raises(InputError, match="no such host"):
        Transport(["a", "b"], 0, "nobody.invalid", 29400, keys=keys_of("ab", 0), timeout=60.0)


@pytest.mark.slow_but_for("0")
@pytest.mark.parametrize("which", [0, 1])
def test_who_lacks_the_key_is_told_and_does_not_come_in(which):
    said = []
    told = met("ab", timeout=2.0, pairs={which: OTHER_PAIRS}, say=said.append)
    assert "has another key of the fleet than 'b'" in told[1]["error"]
    assert told[1]["seconds"] < 2
    assert "for 'b', who did not come" in told[0]["error"]
    assert "where member 'b' is awaited, was not let in: it does not have the key of this fleet's plan" in said[0]
    assert len(said) == 1


def test_a_member_does_not_come_in_where_another_is_awaited():
    """With the right keys of the one, and its own secret one."""
    said, pairs = [], PAIRS | {"b": PAIRS["c"]}
    told = met("ab", timeout=1.0, pairs={1: pairs}, say=said.append)
    assert "has another key of the fleet than 'b'" in told[1]["error"]
    assert said[0] == "127.0.0.1 was not let in as member 'b': it does not have the key of this fleet's plan"


def test_a_member_is_there_once_and_of_the_same_plan():
    port = free_port(count=3)

    def late(plan):
        def come(rank):
            time.sleep(0.5)
            return Transport(list("abc"), 1, "127.0.0.1", port, keys=keys_of("abc", 1), timeout=9.0, plan=plan)

        return come

    def first(rank):
        return Transport(list("abc"), rank, "127.0.0.1", port, keys=keys_of("abc", rank), timeout=9.0)

    told = in_threads({0: first, 1: first, 2: late("")})
    assert "it is there already, from another place; start each member once" in told[2]["error"]
    port = free_port(count=3)
    told = in_threads({0: first, 1: late("another")})
    assert "does not let 'b' in: it runs another plan of the fleet; copy the plan's folder again" in told[1]["error"]


@pytest.mark.slow_but_for("repeats")
@pytest.mark.parametrize("does", ["writes", "is silent", "comes often", "repeats"])
def test_a_stranger_takes_no_memory_and_keeps_nobody_out(does):
    """200 MiB written into the meeting once counted against a member's cap."""
    port, stop = free_port(), threading.Event()

    def stranger():
        held = []
        while not stop.is_set():
            try:
                one = socket.create_connection(("127.0.0.1", port), timeout=5)
                held.append(one)
                if len(held) > 100:
                    held.pop(0).close()
                if does == "writes":
                    for _ in range(200):
                        one.sendall(bytes(1 << 20))
                elif does == "repeats":  # says back what it is sent
                    one.sendall((one.recv(48) * 7)[:320])
                    one.recv(320)
                elif does == "is silent" and len(held) == 100:
                    stop.wait()
            except OSError:
                time.sleep(0.01)
        for one in held:
            one.close()

    told = "print(json.dumps({'told': meeting.receive_json(1), 'peak': memory().peak - before}))"
    one = started(0, port, "a,b", 40, told)
    strangers = [threading.Thread(target=stranger) for _ in range(3)]
    for each in strangers:
        each.start()
    time.sleep(3)
    try:
        other = Transport(["a", "b"], 1, "127.0.0.1", port, keys=keys_of("ab", 1), timeout=40.0)
        other.send_json("hello", 0)
        found = answers({0: one})[0]
        other.hang_up()
    finally:
        stop.set()
        for each in strangers:
            each.join()
    assert found["told"] == "hello"
    assert found["peak"] < 14 << 20


def test_a_stranger_that_goes_is_not_taken_for_a_member():
    """It dials where a member has come already, and goes while the others come, and once all have met."""
    port, strangers = free_port(count=2), []

    def dial(_):
        time.sleep(0.5)  # the second member has come
        for _ in range(4):
            strangers.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        for one in strangers[:2]:
            one.close()

    def come(rank):
        time.sleep(1.5 * (rank == 2))
        return Transport(list("abc"), rank, "127.0.0.1", port, keys=keys_of("abc", rank), timeout=9.0)

    members = in_threads({0: come, 1: come, 2: come, 3: dial})
    for one in strangers[2:]:
        one.close()
    time.sleep(0.5)
    members[1].send_json("hello", 0)
    assert members[0].receive_json(1) == "hello"
    assert not any(peer.ended for rank in range(3) for peer in members[rank]._peers.values())
    for rank in range(3):
        members[rank].close()


def test_what_is_sent_out_of_step_fails_all_that_follows():
    members = met("ab")
    members[0].send(torch.ones(3), 1).wait()
    for _ in range(2):
        with pytest.raises(RunError, match="the members are out of step"):
            members[1].receive_json(0)
    for member in members.values():
        member.hang_up()
    with pytest.raises(RunError):  # and does nothing to what the system has given its descriptor to
        members[1].receive_json(0)


def test_what_the_hub_says_of_the_others_grows_with_a_place_for_each(monkeypatch):
    """So that it fits a message for a hundred members too, whatever each says of itself."""
    monkeypatch.setattr(meetings, "FRAME_BYTES", 400)
    members = met("abcdefgh")
    members[7].send_json("hello", 1)
    assert members[1].receive_json(7) == "hello"
    for member in members.values():
        member.hang_up()


def filters_are_allowed():
    """Whether the kernel lets this user put a filter on a socket, which some kernels keep for root."""
    with socket.socket() as listener:
        code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0))  # drop all
        try:
            listener.setsockopt(socket.SOL_SOCKET, 26, struct.pack("@HP", 1, ctypes.addressof(code)))
        except PermissionError:
            return False
        return True


@pytest.mark.skipif(not filters_are_allowed(), reason="this user may put no filter on a socket")
def test_once_all_have_met_nobody_listens():
    port = free_port()
    members = met("ab", port=port)
    with pytest.raises(OSError, match=r"timed out|refused"):
        socket.create_connection(("127.0.0.1", port), timeout=0.5)
    for member in members.values():
        member.hang_up()


@pytest.mark.parametrize("text", ["", "ab" * 32, "{", "[]", "{}", '{"a": 1, "b": 2}', "[" * 10**5])
def test_keys_are_keys(tmp_path, text):
    path = tmp_path / "fleet.key"
    with pytest.raises(InputError, match="make it again with `tightfit fleet plan`"):
        read_keys(str(path), ["a", "b"], 0)
    path.write_text(text)
    with pytest.raises(InputError, match="make it again with `tightfit fleet plan`"):
        read_keys(str(path), ["a", "b"], 0)


def test_who_reads_the_wire_gets_nothing():
    """All bytes that pass between two members, through somebody who stands between them."""
    port, between, seen = free_port(), socket.create_server(("127.0.0.1", 0)), []

    def copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                seen.append(data)
                target.sendall(data)
        source.close()
        target.close()

    def stand_between():
        one = between.accept()[0]
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError):
                other = socket.create_connection(("127.0.0.1", port))
                break
            time.sleep(0.05)
        for pair in ((one, other), (other, one)):
            threading.Thread(target=copy, args=pair, daemon=True).start()

    threading.Thread(target=stand_between, daemon=True).start()
    at = {0: port, 1: between.getsockname()[1]}
    members = in_threads(
        {
            rank: lambda rank: Transport(["a", "b"], rank, "127.0.0.1", at[rank], keys=keys_of("ab", rank), timeout=9.0)
            for rank in at
        }
    )
    secret = b"private words of somebody " * 100
    members[0].send_json(secret.decode(), 1)
    assert members[1].receive_json(0) == secret.decode()
    members[1].send(torch.zeros(1 << 16), 0)
    room = torch.ones(1 << 16)
    members[0].receive(room, 1).wait()
    assert not room.any()
    for member in members.values():
        member.close()
    between.close()
    wire = b"".join(seen)
    assert len(wire) > (1 << 18) + len(secret)
    assert b"private" not in wire
    assert b"waits" not in wire
    assert b"plan" not in wire
    assert bytes(256) not in wire


@pytest.mark.slow
def test_who_is_waited_for_in_a_run_is_said_within_ten_seconds():
    said = []
    members = met("abc", timeout=30.0, say=said.append)
    lose(members, [(1, 2)])
    told = waiting(members, {2: lambda _: time.sleep(14), 0: lambda _: time.sleep(14)})
    assert any(
        re.match(r"waiting for member 'c', since 10 s: nothing has come from it for \d+ s, after 30 s", one)
        for one in said
    ), (said, told)
