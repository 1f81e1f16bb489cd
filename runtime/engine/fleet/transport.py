"""Messages between the training processes of a fleet, over the connections that they made when they met.

Messages to a peer, and from it, pass in order, each with its tag and its length; what comes has to be what is waited
for. Threads send and receive them while the process computes. Beside the messages every member tells the others that it
lives and whom it waits for, and says so when it ends or finds another one gone. So whoever waits in vain knows who is
at fault: not the neighbour that waits itself, but the member at the end of the chain of those that wait, or the network
between.

Members prove to each other that they have the fleet's key (`tightfit.runtime.engine.fleet.meeting`). Messages are not
encrypted.
"""

from __future__ import annotations

import ctypes
import json
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.errors import InputError, MemberGoneError, RunError
from tightfit.runtime.engine.fleet.meeting import (
    CONTROL,
    DATA,
    LOOK_SECONDS,
    Meeting,
    PeerConnections,
    receive_frame,
    send_frame,
)

if TYPE_CHECKING:
    from torch import Tensor

BEAT_SECONDS = 2.0
"""between two signs of life, at most; a fifth of the fleet's timeout where that is less"""
CONTROL_SECONDS = 5.0
"""for a frame of a few bytes that is under way; after that its connection is taken for ended"""
CHUNK = 1 << 20
"""bytes that are sent or received at once; each is a sign of life"""
JSON_BYTES = 1 << 24
"""of what JSON holds in a message, at most"""
ENDING_SECONDS, ENDING_SHARE = 30.0, 0.1
"""that a member which is asked to end still waits for the others to end the step with it: seconds, and of the fleet's
timeout
"""
FRAME = struct.Struct("<IQ")
"""before each message: its tag, and its bytes"""
MESSAGE, HEADER = 0, 1
"""tags of messages"""


class Pending:
    """A message under way. `wait` returns once it has been received, or sent."""

    def __init__(self, transport: Transport, peer: int, tag: int, room: Any, size: int | None, held: Any) -> None:
        """`room`: the bytes to send, or to fill, `size` of them; None: as many as come. `held`: what has to outlive
        them.
        """
        self._transport, self.peer, self.tag, self.room, self.size = transport, peer, tag, room, size
        self._held = held
        self.done = threading.Event()
        self.error: OSError | RunError | None = None

    def wait(self) -> None:
        """Raises MemberGoneError where a member has ended or takes longer than the fleet waits."""
        if not self.done.is_set():
            self._transport.wait(self)
        if isinstance(self.error, OSError):
            raise self._transport.lost(self.peer)
        if self.error:
            raise self.error


class _Peer:
    """Another member: its connections, and what is known of it."""

    def __init__(self, name: str, links: PeerConnections) -> None:
        self.name = name
        self.control, self.data = links.sockets[CONTROL], links.sockets[DATA]
        for one, seconds in ((self.control, CONTROL_SECONDS), (self.data, None)):
            one.settimeout(seconds)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.heard = time.monotonic()
        """when the latest byte came"""
        self.moved = self.heard
        """when a message to it or from it got on"""
        self.ended = False
        """whether it has closed its connections"""
        self.quiet = 0.0
        """then: seconds before in which nothing came"""
        self.left = False
        """whether it has said that its run is over"""
        self.waits: list[int] = []
        """whom it waits for"""
        self.lanes: dict[str, queue.SimpleQueue[Pending | None]] = {}
        self.threads: list[threading.Thread] = []

    def submit(self, direction: str, pending: Pending) -> None:
        """Have a message sent or received after those that were submitted before it."""
        if direction not in self.lanes:
            self.lanes[direction] = queue.SimpleQueue()
            work = self._send if direction == "send" else self._receive
            lane = (self.lanes[direction], work)
            thread = threading.Thread(target=self._carry_out, args=lane, name=f"tightfit-{direction}", daemon=True)
            thread.start()
            self.threads.append(thread)
        self.lanes[direction].put(pending)

    def _carry_out(self, lane: queue.SimpleQueue[Pending | None], work: Callable[[Pending], None]) -> None:
        failed: OSError | RunError | None = None
        while (pending := lane.get()) is not None:
            try:
                if failed is None:
                    work(pending)
            except (OSError, RunError) as error:
                failed = error
            pending.error = failed
            pending.done.set()
            del pending

    def _send(self, pending: Pending) -> None:
        room = memoryview(pending.room)
        self.data.sendall(FRAME.pack(pending.tag, len(room)), socket.MSG_MORE)
        while room:
            room = room[self.data.send(room[:CHUNK]) :]
            self.moved = time.monotonic()

    def _receive(self, pending: Pending) -> None:
        head = bytearray(FRAME.size)
        self._fill(memoryview(head))
        tag, size = FRAME.unpack(head)
        fits = size <= JSON_BYTES if pending.size is None else size == pending.size
        if tag != pending.tag or not fits:
            raise RunError(
                f"member {self.name!r} has sent {size} bytes of kind {tag} where {pending.size} of kind {pending.tag}"
                " are due: the members are out of step; start all with the same tightfit"
            )
        if pending.room is None:
            pending.room = bytearray(size)
        self._fill(memoryview(pending.room))

    def _fill(self, room: memoryview) -> None:
        while room:
            count = self.data.recv_into(room, min(CHUNK, len(room)))
            if not count:
                raise ConnectionResetError("it closed the connection")
            room = room[count:]
            self.heard = self.moved = time.monotonic()


class Transport:
    """This process's connections to the other members, which are numbered in the order of `members`."""

    def __init__(
        self,
        members: Sequence[str],
        rank: int,
        address: str,
        port: int,
        *,
        key: bytes,
        timeout: float,
        plan: str = "",
        listens: int = 0,
        stopping: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Meet the other members at `address`, where the member `listens` does.

        `key` and `plan` have to be the same for all. `timeout` is in seconds: how long to wait for the others to
        appear, and later for a sign of life and for a message to get on. Raises RunError where they do not meet, and
        where `stopping` says so while it waits; `say` is told who is waited for.
        """
        self.members, self.rank, self.plan, self.timeout, self._stopping = members, rank, plan, timeout, stopping
        self._beat = min(BEAT_SECONDS, timeout / 5)
        self._verdict: tuple[int, str] | None = None
        """who is gone, and what is said of it"""
        self._waits: list[int] = []
        self._asked: float | None = None
        """when this process was first found to be asked to end"""
        self._lock, self._speaking, self._hung_up = threading.Lock(), threading.Lock(), threading.Event()
        meeting = Meeting(members, rank, listens, key, timeout=timeout, plan=plan, stopping=stopping, say=say)
        links = meeting.meet(address, port)
        self._peers = {other: _Peer(members[other], links[other]) for other in sorted(links)}
        self._living = threading.Thread(target=self._live, name="tightfit-fleet", daemon=True)
        self._living.start()

    def send(self, tensor: Tensor, peer: int, tag: int = MESSAGE) -> Pending:
        """Begin sending a contiguous tensor, which must not change until the message is sent."""
        return self._submit("send", peer, tag, bytes_of(tensor), tensor)

    def receive(self, tensor: Tensor, peer: int, tag: int = MESSAGE) -> Pending:
        """Begin receiving the next message of a peer into a contiguous tensor of its size."""
        return self._submit("receive", peer, tag, bytes_of(tensor), tensor)

    def send_json(self, content: Any, peer: int) -> None:
        """Send what JSON can hold; returns once it is sent."""
        text = json.dumps(content).encode()
        assert len(text) <= JSON_BYTES
        self._submit("send", peer, HEADER, text).wait()

    def receive_json(self, peer: int) -> Any:
        """Wait for what a peer sends by `send_json`."""
        pending = self._submit("receive", peer, HEADER, None)
        pending.wait()
        return json.loads(pending.room)

    def send_parts(self, parts: Iterable[memoryview | bytes], peer: int) -> None:
        """Send bytes in parts, a message for each; returns once they are sent."""
        for part in parts:
            self._submit("send", peer, MESSAGE, memoryview(part)).wait()

    def receive_parts(self, size: int, peer: int, part: int) -> Iterator[memoryview]:
        """The `size` bytes that a peer sends by `send_parts`, in parts of `part` bytes and the rest."""
        for done in range(0, size, part):
            room = memoryview(bytearray(min(part, size - done)))
            self._submit("receive", peer, MESSAGE, room).wait()
            yield room

    def _submit(self, direction: str, peer: int, tag: int, room: Any, held: Any = None) -> Pending:
        pending = Pending(self, peer, tag, room, None if room is None else len(room), held)
        self._peers[peer].submit(direction, pending)
        return pending

    # --- waiting, and who is at fault -------------------------------------------------------------------------------

    def wait(self, pending: Pending) -> None:
        """Wait until a message is through. Raises MemberGoneError where that cannot be expected any more."""
        begun, peer = time.monotonic(), self._peers[pending.peer]
        self._waits.append(pending.peer)
        try:
            while not pending.done.wait(LOOK_SECONDS):
                if self._verdict is None:
                    self._judge(pending.peer, time.monotonic() - max(begun, peer.moved))
                if self._verdict is not None:
                    raise self._gone()
        finally:
            self._waits.remove(pending.peer)

    def _judge(self, awaited: int, waited: float) -> None:
        """Find out whether a member is gone: one that has closed its connections, or of which nothing has come for too
        long; or which nobody hears anything of but signs of life.

        Whether the awaited one has closed its connections is left to the thread that moves the message: what it sent
        before it ended may not all have been read.
        """
        now = time.monotonic()
        for rank, peer in self._peers.items():
            if peer.ended and rank != awaited and not peer.left:
                self._tell(rank, self._ended(peer))
                return
        silent = [rank for rank, peer in self._peers.items() if now - peer.heard > self.timeout and not peer.left]
        if silent:  # the latest word of others may have come a little later over a network that was cut for all
            late = self.timeout - 2 * self._beat
            silent += [rank for rank, peer in self._peers.items() if rank not in silent and now - peer.heard > late]
            self._tell(silent[0], self._silence(silent))
        elif waited > self.timeout + 2 * self._beat:  # by then others have told what they hear nothing of
            culprit = self._last_in_chain(awaited)
            self._tell(culprit, f"did not answer for {waited:.0f} s, though it gives signs of life")
        elif self._stopping():
            self._asked = self._asked or now
            mute = now - self._peers[awaited].heard > max(3 * self._beat, LOOK_SECONDS)
            if mute or now - self._asked > max(ENDING_SECONDS, ENDING_SHARE * self.timeout):
                self._tell(self.rank, f"was asked to end, and did not wait any longer for {self.members[awaited]!r}")

    def _ended(self, peer: _Peer) -> str:
        """What is said of a member that has closed its connections: its last words may have been lost on the way."""
        quiet = peer.quiet if peer.ended else time.monotonic() - peer.heard
        told = "has ended without a word"
        if quiet > max(1.0, 3 * self._beat):
            told += (
                f", after {quiet:.0f} s in which nothing came from it: it stood still, or the network between them"
                " is cut"
            )
        return told

    def _silence(self, silent: Sequence[int]) -> str:
        """What is said of members of which nothing has come for too long; the first is the one that is named."""
        if len(silent) == len(self._peers) > 1:
            return (
                f"does not answer, nor does any other: nothing has come for {self.timeout:.0f} s, so that it is"
                f" {self.members[self.rank]!r}, this one, that is cut off"
            )
        return (
            f"is out of reach of {self.members[self.rank]!r}: nothing has come for {self.timeout:.0f} s; it stands"
            " still, or the network between them is cut"
        )

    def _last_in_chain(self, peer: int) -> int:
        """The member that all others wait for, from one that this member waits for."""
        seen = {self.rank}
        while peer not in seen and peer in self._peers:
            seen.add(peer)
            further = [rank for rank in self._peers[peer].waits if rank not in seen]
            if not further:
                break
            peer = further[0]
        return peer

    def lost(self, peer: int) -> MemberGoneError:
        """The error for a peer whose connection has ended: it names the member that was the first to end."""
        end = time.monotonic() + max(1.0, 2 * LOOK_SECONDS)
        while self._verdict is None and not self._peers[peer].ended and time.monotonic() < end:
            time.sleep(LOOK_SECONDS / 10)  # a word about it may be under way
        if self._verdict is None:
            self._tell(peer, self._ended(self._peers[peer]))
        return self._gone()

    def _gone(self) -> MemberGoneError:
        assert self._verdict
        rank, why = self._verdict
        return MemberGoneError(f"member {self.members[rank]!r} of the fleet {why}", self.members[rank])

    def _tell(self, rank: int, why: str) -> None:
        """Settle who is gone, unless that is settled, and say so to all others."""
        with self._lock:
            if self._verdict is not None:
                return
            self._verdict = rank, why
        self._say_to_all({"gone": rank, "why": why})

    def _say_to_all(self, frame: dict[str, Any]) -> None:
        with self._speaking:
            for peer in self._peers.values():
                with suppress(OSError):
                    send_frame(peer.control, frame)

    def _live(self) -> None:
        """Give signs of life and hear those of the others, until all others have ended; what they sent before can still
        be received, until this member hangs up.
        """
        beat = 0.0
        while living := {peer.control: peer for peer in self._peers.values() if not peer.ended}:
            now = time.monotonic()
            if now >= beat:
                beat = now + self._beat
                self._say_to_all({"waits": list(self._waits)})
            ready, _, _ = select.select(list(living), [], [], max(0.0, beat - time.monotonic()))
            for one in ready:
                self._hear(living[one], receive_frame(one))
        self._hung_up.wait()
        for peer in self._peers.values():
            for thread in peer.threads:
                thread.join()
            peer.control.close()
            peer.data.close()

    def _hear(self, peer: _Peer, frame: dict[str, Any] | None) -> None:
        quiet, peer.heard = time.monotonic() - peer.heard, time.monotonic()
        if frame is None:
            peer.ended, peer.quiet = True, quiet
        elif "waits" in frame:
            peer.waits = frame["waits"]
        elif "left" in frame:
            peer.left = True
        elif "gone" in frame:
            rank, why = int(frame["gone"]), str(frame["why"])
            other = self._peers.get(rank)
            if other and other is not peer and peer.heard - other.heard < 2 * self._beat and "out of reach" in why:
                why += f"; {self.members[self.rank]!r} hears both, so that it is the network"
            self._tell(rank, why)  # on to those whom it does not reach

    # --- ending -----------------------------------------------------------------------------------------------------

    def leave(self, why: str) -> None:
        """Tell the others that this member ends, and why, unless one has ended already."""
        self._tell(self.rank, why)

    def hang_up(self) -> None:
        """Close the connections to the other members, so that those who wait for this one hear of it at once."""
        for peer in self._peers.values():
            for lane in peer.lanes.values():
                lane.put(None)
            for one, how in ((peer.data, socket.SHUT_RDWR), (peer.control, socket.SHUT_WR)):
                with suppress(OSError):
                    one.shutdown(how)
        self._hung_up.set()

    def close(self) -> None:
        """This member's run is over, as planned."""
        self._say_to_all({"left": True})


def read_key(path: str) -> bytes:
    """The key of a fleet's plan. Raises InputError where there is none."""
    try:
        with open(path, encoding="ascii") as file:
            key = bytes.fromhex(file.read(256))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: no key of the fleet ({error}); it lies in the folder of the fleet's plan: give every member all"
            " of it, or make it again with `tightfit fleet plan`"
        ) from error
    if len(key) < 32:
        raise InputError(
            f"{path}: a key of {len(key)} bytes, which is too short; make it again with `tightfit fleet plan`"
        )
    return key


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which has to outlive them."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
