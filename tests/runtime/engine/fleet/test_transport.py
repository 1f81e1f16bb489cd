"""gloo in the training process: what it takes, and what members are told of one that ends."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

from tightfit.runtime.common.interpreter import python_path
from tightfit.runtime.engine.start.process import child_environment

MEET = """
import json, os, sys
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import lean_torch
lean_torch.load()
import torch
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.engine.fleet.transport import Transport
rank, port, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
before = memory().resident
try:
    meeting = Transport(names, rank, "127.0.0.1", port, timeout=float(sys.argv[4]))
    added = memory().resident - before
    exec(sys.argv[5])
except TightfitError as error:
    print(json.dumps({"error": str(error)}), flush=True)
    if "meeting" in globals():
        meeting.hang_up()
        meeting.linger()
"""
FULL = """
import json, sys
import torch, torch.distributed as dist
from tightfit.runtime.engine.device.resident import memory
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=0, world_size=1)
print(json.dumps({"resident": memory().resident}))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(program, *arguments):
    environment = child_environment(1) | {"PYTHONPATH": python_path()}
    words = [sys.executable, "-P", "-c", program, *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def meeting(names: str, does: dict[int, str], timeout: float = 20.0):
    """What each member says that does its part once they have met; a member without a part never comes."""
    port = free_port()
    members = {rank: started(MEET, rank, port, names, timeout, part) for rank, part in does.items()}
    said = {rank: member.communicate(timeout=60) for rank, member in members.items()}
    assert all(not errors or "Traceback" not in errors for _, errors in said.values()), said
    return {rank: json.loads(words) if words.strip() else None for rank, (words, _) in said.items()}


def test_it_takes_a_fraction_of_what_torch_distributed_takes():
    told = meeting("a", {0: "print(json.dumps({'added': added, 'resident': memory().resident}))"})[0]
    assert told["added"] < 12 << 20
    words, errors = started(FULL, free_port()).communicate(timeout=120)
    assert json.loads(words)["resident"] > told["resident"] + (60 << 20), errors


def test_members_exchange_tensors_and_what_json_holds():
    sends = "meeting.send_json({'from': rank}, 1); meeting.send(torch.arange(5.0), 1).wait()"
    takes = (
        "told = meeting.receive_json(0); room = torch.empty(5); meeting.receive(room, 0).wait();"
        "print(json.dumps({'told': told, 'room': room.tolist()}))"
    )
    assert meeting("a,b", {0: sends, 1: takes})[1] == {"told": {"from": 0}, "room": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_member_that_dies_is_named_by_all_the_others(dies):
    """Each waits for its neighbour; only a neighbour of the dead member sees it end, the others hear of it."""
    waits = "meeting.receive(torch.empty(1), (rank + 1) % 3).wait()"
    names = "first,second,third"
    does = dict.fromkeys(range(3), waits) | {dies: "import time; time.sleep(0.5); os._exit(9)"}
    told = meeting(names, does)
    for rank in {0, 1, 2} - {dies}:
        assert told[rank]["error"].startswith(f"member '{names.split(',')[dies]}' of the fleet has ended"), told


def test_why_a_member_leaves_is_said_by_it():
    told = meeting("a,b", {0: "meeting.receive(torch.empty(1), 1).wait()", 1: "meeting.leave('has ended: no disk')"})
    assert told[0]["error"] == "member 'b' of the fleet has ended: no disk"


def test_a_member_that_is_silent_is_not_waited_for_forever():
    slow = "import time; time.sleep(4); os._exit(0)"
    begun = time.monotonic()
    told = meeting("a,b", {0: "meeting.receive(torch.empty(1), 1).wait()", 1: slow}, timeout=1.5)
    assert "member 'b' of the fleet did not answer for 2 s" in told[0]["error"]
    assert time.monotonic() - begun < 60


def test_a_member_that_never_comes_is_an_error_with_advice():
    told = meeting("a,b", {0: "pass"}, timeout=2.0)[0]
    assert "member 'a' did not meet the others at 127.0.0.1:" in told["error"]
    assert "start all 2 members (a, b)" in told["error"]
