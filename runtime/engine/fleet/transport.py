"""Messages between the training processes of a fleet: gloo, reached without the Python of `torch.distributed`.

gloo and its rendezvous store come with PyTorch's native libraries. Reached through `torch._C` they add 7 MiB to a
training process, 1 MiB of them for good; the process with all of `torch.distributed` holds more than 60 MiB more
(`tests/runtime/engine/fleet/test_transport.py` measures both). Messages are not encrypted: the members trust each
other and the network between them.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.errors import MemberGoneError, RunError

if TYPE_CHECKING:
    from torch import Tensor

HERE, GONE, HEARD = "here", "gone", "heard"
"""keys of the store: how many members have come; the first that stops says which one is gone, and why; how many know"""
LOOK_SECONDS = 0.1
"""between two looks whether the others have come"""
STORE_SECONDS = 10.0
"""seconds within which the store answers; where it does not, the member that holds it is taken for gone"""
DATA, HEADER = 0, 1
"""tags of messages"""


class Pending:
    """A message under way. `wait` returns once it has been received, or sent."""

    def __init__(self, transport: Transport, work: Any, peer: int) -> None:
        self._transport, self._work, self._peer = transport, work, peer

    def wait(self) -> None:
        """Raises MemberGoneError where the peer has ended or takes longer than the fleet waits."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._transport.lost(self._peer, str(error)) from None


class Transport:
    """This process's connections to the other members, which are numbered in the order of `members`."""

    def __init__(
        self,
        members: Sequence[str],
        rank: int,
        address: str,
        port: int,
        *,
        timeout: float,
        agent: bool = False,
        attempt: int = 0,
        interface: str = "",
        listens: int = 0,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Meet the other members at the store at `address`; the member `listens` opens it, unless an `agent` has.

        `timeout` is in seconds: how long to wait for the others to appear, and later for one message. `attempt` counts
        the starts by that agent, whose store outlives them. `interface` names the network device; "": the one that
        leads to `address`. Raises RunError where they do not meet, and where `stopping` says so while it waits.
        """
        import torch

        self.members, self.rank, self.timeout = members, rank, timeout
        self._holds_store = rank == listens and not agent
        self._listens = listens
        self._knows = False
        """whether this member has heard of one that is gone, and has said so"""
        if not hasattr(torch._C, "_distributed_c10d"):
            torch._C._c10d_init()
        c10d: Any = torch._C._distributed_c10d
        wait = timedelta(seconds=timeout)
        meeting = _Meeting(members, rank, f"{address}:{port}", timeout, stopping)
        try:
            if not self._holds_store:
                meeting.until(lambda: _listens(address, port))
            store = c10d.TCPStore(address, port, len(members), self._holds_store, wait, wait_for_workers=False)
            self._store = c10d.PrefixStore(f"tightfit/{attempt}", store)
            self._store.add(HERE, 1)
            meeting.until(lambda: self._store.add(HERE, 0) >= len(members))
            options = c10d.ProcessGroupGloo._Options()
            options._devices = [c10d.ProcessGroupGloo.create_device(**_device(interface, address, port))]
            options._timeout = wait
            options._threads = 1
            before = _sockets()
            self._group = c10d.ProcessGroupGloo(self._store, rank, len(members), options)
            self._connections = _sockets() - before
        except RuntimeError as error:
            raise meeting.failed(_first_line(error)) from None
        self._store.set_timeout(timedelta(seconds=STORE_SECONDS))

    def send(self, tensor: Tensor, peer: int, tag: int = DATA) -> Pending:
        """Begin sending a contiguous tensor, which must not change until the message is sent."""
        return self._begun(self._group.send, tensor, peer, tag)

    def receive(self, tensor: Tensor, peer: int, tag: int = DATA) -> Pending:
        """Begin receiving the next message of a peer into a contiguous tensor of its size."""
        return self._begun(self._group.recv, tensor, peer, tag)

    def send_json(self, content: Any, peer: int) -> None:
        """Send what JSON can hold; returns once it is sent."""
        import torch

        text = json.dumps(content).encode()
        self.send(torch.tensor([len(text)], dtype=torch.int64), peer, HEADER).wait()
        self.send(torch.frombuffer(bytearray(text), dtype=torch.uint8), peer, HEADER).wait()

    def receive_json(self, peer: int) -> Any:
        """Wait for what a peer sends by `send_json`."""
        import torch

        length = torch.zeros(1, dtype=torch.int64)
        self.receive(length, peer, HEADER).wait()
        text = torch.empty(int(length), dtype=torch.uint8)
        self.receive(text, peer, HEADER).wait()
        return json.loads(bytes(text.tolist()))

    def leave(self, why: str) -> None:
        """Tell the others that this member ends, and why, unless one has ended already."""
        self._tell(self.rank, why)

    def hang_up(self) -> None:
        """Close the connections to the other members, so that those who wait for this one hear of it at once; gloo
        closes none before the process ends.
        """
        for descriptor in self._connections:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def linger(self) -> None:
        """Before this member ends: where it holds the store and one is gone, wait until the others have heard of it, at
        most `STORE_SECONDS`.
        """
        end = time.monotonic() + STORE_SECONDS
        while self._holds_store and self._knows and time.monotonic() < end:
            if self._store.add(HEARD, 0) >= len(self.members) - 1:  # all but the one that is gone
                return
            time.sleep(0.05)

    def lost(self, peer: int, reason: str) -> MemberGoneError:
        """The error for a peer that no longer answers: it names the member that was the first to end."""
        slow = "imed out" in reason
        why = f"did not answer for {self.timeout:.0f} s" if slow else "has ended without a word"
        try:
            told = self._tell(peer, why)
        except RuntimeError:  # the store has gone with the member that holds it
            told = {"rank": self._listens, "why": "has ended without a word"}
        name = self.members[told["rank"]]
        return MemberGoneError(f"member {name!r} of the fleet {told['why']}", name)

    def _tell(self, rank: int, why: str) -> dict[str, Any]:
        """Write down who is gone unless somebody has already; returns what is written there then."""
        mine = json.dumps({"rank": rank, "why": why})
        told: dict[str, Any] = json.loads(self._store.compare_set(GONE, "", mine))
        if not self._knows:
            self._store.add(HEARD, 1)
            self._knows = True
        return told

    def _begun(self, call: Any, tensor: Tensor, peer: int, tag: int) -> Pending:
        try:
            return Pending(self, call([tensor], peer, tag), peer)
        except RuntimeError as error:
            raise self.lost(peer, str(error)) from None


class _Meeting:
    """Waits for the other members in short sleeps, so that signals are seen."""

    def __init__(
        self, members: Sequence[str], rank: int, place: str, timeout: float, stopping: Callable[[], bool]
    ) -> None:
        self._members, self._rank, self._place = members, rank, place
        self._timeout, self._stopping = timeout, stopping
        self._end = time.monotonic() + timeout

    def until(self, come: Callable[[], bool]) -> None:
        """Wait until `come` is true. Raises RunError where that takes too long, or the process is asked to end."""
        while not come():
            if self._stopping():
                raise RunError("interrupted while waiting for the other members; start again")
            if time.monotonic() > self._end:
                raise self.failed("some member has not come")
            time.sleep(LOOK_SECONDS)

    def failed(self, why: str) -> RunError:
        names = ", ".join(self._members)
        return RunError(
            f"member {self._members[self._rank]!r} did not meet the others at {self._place} within {self._timeout:.0f} s:"
            f" {why}; start all {len(self._members)} members ({names}), with an address that each of them reaches"
        )


def _listens(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=STORE_SECONDS):
        return True
    return False


def _device(interface: str, address: str, port: int) -> dict[str, str]:
    """The network device for gloo: the one named, or the one that leads to `address`."""
    if interface:
        return {"interface": interface}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing: it looks up the route
            return {"hostname": str(probe.getsockname()[0])}
        except OSError as error:
            raise RunError(f"there is no way from here to {address}: {error.strerror}; give another address") from error


def _sockets() -> set[int]:
    """Descriptors of this process's sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
