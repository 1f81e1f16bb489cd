"""Messages between the training processes of a fleet, over the connections that they made when they met.

Messages to a peer, and from it, pass in order, in chunks, each with its message's tag and length; what comes has to be
what is waited for. Of what a peer has not asked for yet at most `WINDOW` chunks are on their way: it says which it has
taken. One thread sends and receives while the process computes. Beside the messages every member tells the others that
it lives and whom it waits for, and says so when it ends or finds another one gone. So whoever waits in vain knows who
is at fault: not the neighbour that waits itself, but the member at the end of the chain of those that wait, or the
network between.

Connections are ZeroMQ's (`tightfit.runtime.engine.fleet.meeting`).
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import zmq

from tightfit.runtime.common.errors import MemberGoneError, RunError
from tightfit.runtime.engine.fleet.keys import Keys
from tightfit.runtime.engine.fleet.meeting import CHUNK, EVENT, LOOK_SECONDS, SAY_SECONDS, Link, Meeting, send_words

if TYPE_CHECKING:
    from torch import Tensor

BEAT_SECONDS = 2.0
"""between two signs of life, at most; a fifth of the fleet's timeout where that is less"""
WINDOW = 8
"""chunks of a direction that are under way at once"""
JSON_BYTES = 1 << 24
"""of what JSON holds in a message, at most"""
ENDING_SECONDS, ENDING_SHARE = 30.0, 0.1
"""that a member which is asked to end still waits for the others to end the step with it: seconds, and of the fleet's
timeout
"""
LAST_SECONDS = 2.0
"""for what is on its way when this member ends because another has, or something went wrong"""
FRAME = struct.Struct("<IQQ")
"""before each chunk: its message's tag and bytes, and where in it the chunk begins"""
MESSAGE, HEADER = 0, 1
"""tags of messages"""
NOT_YET = 60.0
"""seconds after which it is said again who is waited for"""


class Pending:
    """A message under way. `wait` returns once it has been received, or sent."""

    def __init__(self, transport: Transport, peer: int, tag: int, room: Any, size: int | None, held: Any) -> None:
        """`room`: the bytes to send, or to fill, `size` of them; None: as many as come. `held`: what has to outlive
        them.
        """
        self._transport, self.peer, self.tag, self.room, self.size = transport, peer, tag, room, size
        self._held = held
        self.at = 0
        """bytes that have been sent, or have come"""
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
    """Another member: its connection, and what is known of it."""

    def __init__(self, name: str, link: Link) -> None:
        self.name, self.link, self.monitor = name, link.socket, link.monitor
        self.end_of_connection = int(zmq.EVENT_DISCONNECTED), link.descriptor
        """what the monitor says then; that of a stranger, who has dialled the same port, has another descriptor"""
        self.heard = time.monotonic()
        """when the latest word or chunk came"""
        self.moved = self.heard
        """when a message to it or from it got on"""
        self.ended = False
        """whether it has closed its connection"""
        self.quiet = 0.0
        """then: seconds before in which nothing came"""
        self.left = False
        """whether it has said that its run is over"""
        self.let_go = False
        """whether it has all that this member has said, which hangs up"""
        self.waits: list[int] = []
        """whom it waits for"""
        self.going: deque[Pending] = deque()
        self.coming: deque[Pending] = deque()
        """messages that are to be sent, and those that are waited for"""
        self.early: deque[tuple[int, int, int, Any]] = deque()
        """chunks that came before they were waited for, at most `WINDOW`: tag, bytes of the message, place, content"""
        self.under_way = 0
        """chunks that were sent and which it has not taken yet"""
        self.error: OSError | RunError | None = None
        """why nothing passes any more"""

    def push(self) -> None:
        """Send what it has room for."""
        while self.going and self.ended:
            self.end(self.going.popleft(), ConnectionResetError("it closed the connection"))
        while self.going and self.under_way < WINDOW and self.error is None:
            pending = self.going[0]
            room, at = memoryview(pending.room), pending.at
            head = FRAME.pack(pending.tag, len(room), at)
            chunk = room[at : at + CHUNK]
            try:
                self.link.send(head, zmq.SNDMORE | zmq.NOBLOCK)
                self.link.send(chunk, zmq.NOBLOCK)
            except zmq.Again:  # it has just ended
                return
            pending.at += len(chunk)
            self.under_way += 1
            if pending.at == len(room):
                self.going.popleft().done.set()

    def take(self) -> None:
        """Put what has come where it is waited for, and say so to the sender."""
        taken = 0
        while self.early and self.coming and self.error is None:
            tag, size, at, chunk = self.early.popleft()
            pending = self.coming[0]
            fits = size <= JSON_BYTES if pending.size is None else size == pending.size
            if tag != pending.tag or not fits or at != pending.at or at + len(chunk) > size:
                self.fail(
                    RunError(
                        f"member {self.name!r} has sent {size} bytes of kind {tag} where {pending.size} of kind"
                        f" {pending.tag} are due: the members are out of step; start all with the same tightfit"
                    )
                )
                return
            if pending.room is None:
                pending.room = bytearray(size)
            memoryview(pending.room)[at : at + len(chunk)] = chunk
            pending.at += len(chunk)
            taken += 1
            if pending.at == size:
                self.coming.popleft().done.set()
        if taken and not self.ended:
            send_words(self.link, {"taken": taken})
        if self.error or (self.ended and not self.early):
            self.fail(ConnectionResetError("it closed the connection"))

    def fail(self, error: OSError | RunError) -> None:
        """Nothing passes any more."""
        self.error = self.error or error
        for lane in (self.going, self.coming):
            while lane:
                self.end(lane.popleft(), self.error)

    @staticmethod
    def end(pending: Pending, error: OSError | RunError) -> None:
        pending.error = error
        pending.done.set()


class Transport:
    """This process's connections to the other members, which are numbered in the order of `members`."""

    def __init__(
        self,
        members: Sequence[str],
        rank: int,
        address: str,
        port: int,
        *,
        keys: Keys,
        timeout: float,
        plan: str = "",
        listens: int = 0,
        stopping: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Meet the other members at `address`, where the member `listens` does, from `port` on.

        `keys` and `plan` have to be of one fleet for all. `timeout` is in seconds: how long to wait for the others to
        appear, and later for a sign of life and for a message to get on. Raises RunError where they do not meet, and
        where `stopping` says so while it waits; `say` is told who is waited for.
        """
        self.members, self.rank, self.plan, self.timeout = members, rank, plan, timeout
        self._stopping, self._say = stopping, say
        self._beat = min(BEAT_SECONDS, timeout / 5)
        self._verdict: tuple[int, str] | None = None
        """who is gone, and what is said of it"""
        self._waits: list[int] = []
        self._asked: float | None = None
        """when this process was first found to be asked to end"""
        self._lock = threading.Lock()
        self._words: deque[dict[str, Any]] = deque()
        """what is to be said to all others"""
        self._linger: float | None = None
        """seconds for what is on its way, once this member hangs up"""
        self._meeting = Meeting(members, rank, listens, keys, timeout=timeout, plan=plan, stopping=stopping, say=say)
        links = self._meeting.meet(address, port)
        self._wake: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
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
        other = self._peers[peer]
        with self._lock:  # against the end of the thread that moves it
            if self._linger is None:
                (other.going if direction == "send" else other.coming).append(pending)
            else:
                other.end(pending, ConnectionResetError("this member has hung up"))
        self._stir()
        return pending

    def _stir(self) -> None:
        """Have the thread look what there is to do."""
        with self._lock:
            if self._wake is not None:  # else it has ended, and the descriptor may be another file's
                os.eventfd_write(self._wake, 1)

    # --- waiting, and who is at fault -------------------------------------------------------------------------------

    def wait(self, pending: Pending) -> None:
        """Wait until a message is through. Raises MemberGoneError where that cannot be expected any more."""
        begun, peer = time.monotonic(), self._peers[pending.peer]
        say = begun + SAY_SECONDS - 2 * LOOK_SECONDS
        self._waits.append(pending.peer)
        try:
            while not pending.done.wait(LOOK_SECONDS):
                now = time.monotonic()
                if self._verdict is None:
                    self._judge(pending.peer, now - max(begun, peer.moved))
                if self._verdict is not None:
                    raise self._gone()
                if now > say:
                    say = now + NOT_YET
                    self._say(self._awaited(pending.peer, now, now - begun))
        finally:
            self._waits.remove(pending.peer)

    def _awaited(self, peer: int, now: float, waited: float) -> str:
        """Who is waited for, and what is known of it."""
        last = self._last_in_chain(peer)
        through = f", for whom {self.members[peer]!r} waits" if last != peer else ""
        quiet = now - self._peers[last].heard
        signs = "it gives signs of life"
        if quiet > max(3 * self._beat, LOOK_SECONDS):
            signs = f"nothing has come from it for {quiet:.0f} s, after {self.timeout:.0f} s it is taken for gone"
        return f"waiting for member {self.members[last]!r}{through}, since {waited:.0f} s: {signs}"

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
        self._words.append(frame)
        self._stir()

    def _live(self) -> None:
        """Send and receive, give signs of life and hear those of the others, until this member hangs up."""
        poller, beat, wake = zmq.Poller(), 0.0, self._wake
        end: float | None = None
        assert wake is not None
        poller.register(wake, zmq.POLLIN)
        for peer in self._peers.values():
            for one in (peer.link, peer.monitor):
                poller.register(one, zmq.POLLIN)
        while True:
            now = time.monotonic()
            if self._linger is not None and end is None:
                end = now + self._linger
                self._words.append({"end": True})
            elif end is not None and (now > end or all(peer.ended or peer.let_go for peer in self._peers.values())):
                break
            if now >= beat:
                beat = now + self._beat
                self._words.append({"waits": list(self._waits)})
            while self._words:
                words = self._words.popleft()
                for peer in self._peers.values():
                    if not peer.ended:
                        send_words(peer.link, words)
            for peer in self._peers.values():
                peer.push()
                peer.take()
            until = beat if end is None else min(beat, end)
            ready = dict(poller.poll(max(0, int(1000 * (until - time.monotonic())) + 1)))
            if wake in ready:
                os.eventfd_read(wake)
            for peer in self._peers.values():
                self._hear(peer)
                if peer.monitor in ready and EVENT.unpack(peer.monitor.recv_multipart()[0]) == peer.end_of_connection:
                    self._hear(peer)  # what it said last
                    peer.quiet, peer.ended = time.monotonic() - peer.heard, True
        with self._lock:
            for peer in self._peers.values():
                peer.fail(ConnectionResetError("this member has hung up"))
            self._wake = None
        os.close(wake)
        self._meeting.close(0)

    def _hear(self, peer: _Peer) -> None:
        """Take all that has come from a member."""
        while True:
            try:
                parts = peer.link.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer.heard = time.monotonic()
            if len(parts) == 2:
                peer.moved = peer.heard
                peer.early.append((*FRAME.unpack(parts[0].buffer), parts[1].buffer))
                peer.take()
                continue
            frame = json.loads(parts[0].bytes)
            if "taken" in frame:
                peer.moved = peer.heard
                peer.under_way -= frame["taken"]
                peer.push()
            elif "waits" in frame:
                peer.waits = frame["waits"]
            elif "left" in frame:
                peer.left = True
            elif "end" in frame:
                send_words(peer.link, {"let go": True})
            elif "let go" in frame:
                peer.let_go = True
            elif "gone" in frame:
                self._told(peer, int(frame["gone"]), str(frame["why"]))

    def _told(self, peer: _Peer, rank: int, why: str) -> None:
        """A member says who is gone."""
        other = self._peers.get(rank)
        if other and other is not peer and peer.heard - other.heard < 2 * self._beat and "out of reach" in why:
            why += f"; {self.members[self.rank]!r} hears both, so that it is the network"
        self._tell(rank, why)  # on to those whom it does not reach

    # --- ending -----------------------------------------------------------------------------------------------------

    def leave(self, why: str) -> None:
        """Tell the others that this member ends, and why, unless one has ended already."""
        self._tell(self.rank, why)

    def hang_up(self, linger: float = LAST_SECONDS) -> None:
        """Close the connections to the other members, so that those who wait for this one hear of it at once; what is
        on its way has `linger` seconds.
        """
        with self._lock:
            self._linger = linger if self._linger is None else self._linger
        self._stir()
        self._living.join(linger + 1.0)

    def close(self) -> None:
        """This member's run is over, as planned: what it has sent arrives."""
        self._say_to_all({"left": True})
        self.hang_up(ENDING_SECONDS)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which has to outlive them."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
