"""How the members of a fleet come together: one listens, the others dial it, and each proves by its key that it is one.

Connections are ZeroMQ's, encrypted and authenticated with CURVE (RFC 25, 26): two members share one. The member that
listens has a port for each of the others, of which it lets in that one alone; the others listen for those after them.
Once all have met, nobody listens any more.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils import z85

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.fleet.keys import Keys

CHUNK = 1 << 16
"""bytes of a message that pass at once; each is a sign of life"""
SEAL_BYTES = 1 << 10
"""that encryption may add to one"""
FRAME_BYTES = 1 << 16
"""of words between members, at most"""
LOOK_SECONDS = 0.1
"""between two looks whether the others have come, and whether a signal has"""
ANSWER_SECONDS = 5.0
"""for an answer of a member that is connected; it looks ten times a second"""
TRIES = 3
"""connections in a row that end before keys are exchanged, after which the other end is none of the fleet"""
PROOF_SECONDS = 10.0
"""that somebody who has dialled has to prove who it is"""
BACKLOG = 64
"""that may have dialled and are not heard yet"""
SAY_SECONDS = 10.0
"""between two lines about who is waited for"""
EVENT = struct.Struct("<HI")
"""of a socket's monitor: the event and its value"""
SO_ATTACH_FILTER, RETURN = 26, 6
"""Linux: the option of a socket that takes a program of packets, and the instruction after which so many bytes of one
are left (socket(7), bpf_common.h)
"""
ZAP = "inproc://zeromq.zap.01"
"""where ZeroMQ asks who is let in (RFC 27)"""


@dataclass
class Link:
    """The connection to another member."""

    socket: Any
    """of ZeroMQ, and its monitor"""
    monitor: Any
    dials: bool
    """whether this member has dialled the other"""
    endpoint: str
    connected: bool = False
    """whether keys have been exchanged"""
    failures: int = 0
    """connections in a row that ended before it was `connected`"""
    refused: bool = False
    """whether the other has ended one when it saw the key"""
    descriptor: int | None = None
    """of the connection on which the other has said who it is: strangers that dial here have others"""
    since: float = 0.0
    """when it was connected"""
    words: dict[str, Any] | None = None
    """what the other has said of itself"""
    whole: bool = False
    """whether both have agreed"""


class Meeting:
    """This member's side of the meeting; `meet` returns the link to each of the others, by their number."""

    def __init__(
        self,
        members: Sequence[str],
        rank: int,
        hub: int,
        keys: Keys,
        *,
        timeout: float,
        plan: str,
        stopping: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        """`hub`: number of the member that the others dial first; `plan`: what all have to be members of."""
        self.members, self.rank, self.hub, self.keys = members, rank, hub, keys
        self.timeout, self.stopping, self.say = timeout, stopping, say
        self.plan = hashlib.sha256(plan.encode()).hexdigest()
        self.context = zmq.Context()
        self.links: dict[int, Link] = {}
        self._poller = zmq.Poller()
        self._doors = self.context.socket(zmq.REP)
        self._doors.bind(ZAP)
        self._poller.register(self._doors, zmq.POLLIN)
        self._end = time.monotonic() + timeout
        self._said = time.monotonic()
        self._listeners: list[socket.socket] = []
        self._strangers: set[str] = set()
        self._news: dict[str, Any] = {}
        """the latest word of the hub"""

    def meet(self, address: str, port: int) -> dict[int, Link]:
        """Meet the others at `address`, where the hub listens from `port` on.

        Raises InputError for an address that cannot be, RunError where somebody does not come in time or has another
        key, and where this process is asked to end meanwhile.
        """
        try:
            if self.rank == self.hub:
                self._gather(address, port)
            else:
                self._come(address, port)
            for listener in self._listeners:
                _hear_nobody(listener)
                listener.close()
            self._doors.close()
            return self.links
        except BaseException as error:
            if self.rank == self.hub:  # it alone knows who has not come
                self._tell({"error": str(error)})
            self.close(linger=1.0)
            raise

    def close(self, linger: float) -> None:
        """End all connections; what is on its way has `linger` seconds."""
        self._doors.close()
        for listener in self._listeners:
            listener.close()
        for link in self.links.values():
            link.socket.disable_monitor()
            link.monitor.close(0)
            link.socket.close(int(1000 * linger))
        self.context.term()

    # --- the member that listens ------------------------------------------------------------------------------------

    def _gather(self, address: str, port: int) -> None:
        others = [rank for rank in range(len(self.members)) if rank != self.rank]
        whose = f"member {self.members[self.rank]!r}, this one,"
        for place, rank in enumerate(others):
            self._listen(rank, listening(address, port + place, whose))
        told: list[int] = []
        while absent := [rank for rank in others if not self.links[rank].whole]:
            if absent != told:
                told = absent
                self._tell({"absent": absent})
            names = self._names(absent)
            self._look(f"has waited at {address}:{port} for {names}, who did not come", names)
        for own, rank in enumerate(others):  # those before it, each with the port at which it is awaited
            before = {other: self.links[other].words or {} for other in others[:own]}
            places = {other: [words["address"], words["ports"][str(rank)]] for other, words in before.items()}
            send_words(self.links[rank].socket, {"places": places})

    def _tell(self, words: dict[str, Any]) -> None:
        for link in self.links.values():
            if link.whole:
                send_words(link.socket, words)

    # --- the members that dial --------------------------------------------------------------------------------------

    def _come(self, address: str, port: int) -> None:
        hub, own = self.hub, self.rank
        others = [rank for rank in range(len(self.members)) if rank != hub]
        host = _resolved(address, f"member {self.members[hub]!r}")
        port += others.index(own)
        unreached = f"did not reach {self.members[hub]!r} at {address}:{port}", self._names([hub])
        while (mine := _own_address(host, port)) is None:
            self._look(*unreached)
        for rank in others[others.index(own) + 1 :]:
            self._listen(rank, listening(mine, 0))
        self._dial(hub, host, port)
        while not self.links[hub].whole or "places" not in self._news:
            names = self._names(self._news.get("absent", [hub]))
            waited = f"has waited with {self.members[hub]!r} for {names}, who did not come", names
            self._look(*(waited if self.links[hub].whole else unreached))
        for rank, place in self._news["places"].items():
            self._dial(int(rank), *place)
        while absent := [rank for rank in others if rank != own and not self.links[rank].whole]:
            self._look(f"did not reach {self._names(absent)}", self._names(absent))

    # --- both -------------------------------------------------------------------------------------------------------

    def _socket(self, rank: int, host: str, port: int, *, dials: bool) -> Link:
        made = self.context.socket(zmq.PAIR)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.IPV6, int(":" in host))
        made.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * PROOF_SECONDS))
        made.setsockopt(zmq.MAXMSGSIZE, CHUNK + SEAL_BYTES)
        # Who takes part bounds what is on its way by itself (`tightfit.runtime.engine.fleet.transport`).
        made.setsockopt(zmq.SNDHWM, 0)
        made.setsockopt(zmq.RCVHWM, 0)
        made.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.public[self.rank])
        made.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret)
        if dials:
            made.setsockopt(zmq.CURVE_SERVERKEY, self.keys.public[rank])
        else:
            made.setsockopt(zmq.CURVE_SERVER, 1)
            made.setsockopt(zmq.ZAP_DOMAIN, str(rank).encode())
        endpoint = f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
        link = self.links[rank] = Link(made, made.get_monitor_socket(), dials, endpoint)
        for one in (link.socket, link.monitor):
            self._poller.register(one, zmq.POLLIN)
        return link

    def _listen(self, rank: int, listener: socket.socket) -> None:
        """Listen for a member from now on."""
        self._listeners.append(listener)
        host, port = listener.getsockname()[:2]
        link = self._socket(rank, host, port, dials=False)
        link.socket.setsockopt(zmq.USE_FD, os.dup(listener.fileno()))
        link.socket.bind(link.endpoint)

    def _dial(self, rank: int, host: str, port: int) -> None:
        link = self._socket(rank, host, port, dials=True)
        link.socket.connect(link.endpoint)

    def _look(self, what: str, absent: str) -> None:
        """Hear the others for a moment, and say from time to time who is waited for, `absent`. Raises RunError once
        this takes too long, which is `what` this member has done, or the process is asked to end.
        """
        now, mine = time.monotonic(), self.members[self.rank]
        if self.stopping():
            raise RunError("interrupted while waiting for the other members; start again")
        if now > self._end:
            raise RunError(
                f"member {mine!r} {what} within {self.timeout:.0f} s; start all {len(self.members)} members"
                f" ({', '.join(self.members)}), with an address of {self.members[self.hub]!r} that each of them reaches"
            )
        if now - self._said >= SAY_SECONDS:
            self._said = now
            self.say(f"waiting for {absent}, {self._end - now:.0f} s more: member {mine!r} {what} yet")
        ready = dict(self._poller.poll(int(1000 * LOOK_SECONDS)))
        if self._doors in ready:
            self._open_or_not()
        for rank, link in self.links.items():
            # What a member says that has met all is for later; its last words come before it is seen that it has gone.
            while not self._met(rank, link) and (frame := received(link.socket)) is not None:
                self._hear(rank, link, frame)
            if self._met(rank, link) and link.socket in self._poller:
                self._poller.unregister(link.socket)
            if link.monitor in ready:
                self._watch(rank, link)
            if link.dials and link.connected and link.words is None and now - link.since > ANSWER_SECONDS:
                raise RunError(
                    f"member {self.members[rank]!r} at {link.endpoint[6:]} does not answer {mine!r}: it is there"
                    " already, from another place; start each member once"
                )

    def _met(self, rank: int, link: Link) -> bool:
        """Whether nothing more is to be heard from a member here."""
        return link.whole and (rank != self.hub or "places" in self._news)

    def _open_or_not(self) -> None:
        """Answer whether somebody that dials is let in (RFC 27): the member that this port is for, by its key."""
        version, request, domain, address, _, mechanism, *proof = self._doors.recv_multipart()
        rank = int(domain)
        known = mechanism == b"CURVE" and z85.encode(proof[0]) == self.keys.public[rank]
        if not known:
            self._refused(f"{address.decode()} was not let in as member {self.members[rank]!r}")
        status = (b"200", b"") if known else (b"400", b"another key")
        self._doors.send_multipart([version, request, *status, b"", b""])

    def _refused(self, who: str) -> None:
        if who not in self._strangers and len(self._strangers) < BACKLOG:
            self._strangers.add(who)
            self.say(f"{who}: it does not have the key of this fleet's plan")

    def _watch(self, rank: int, link: Link) -> None:
        """See what a connection has come to. Raises RunError where it never will be one."""
        event, value = EVENT.unpack(link.monitor.recv_multipart()[0])
        name, mine, here = repr(self.members[rank]), repr(self.members[self.rank]), link.endpoint[6:]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED and not link.connected:
            link.connected, link.since, link.failures = True, time.monotonic(), 0
            if link.dials:
                send_words(link.socket, self._words())
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and not link.dials:
            self._refused(f"somebody that dialled {here}, where member {name} is awaited, was not let in")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and link.dials:
            raise RunError(self._another_key(name, here))
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and link.dials:
            link.refused = True
        elif event == zmq.EVENT_DISCONNECTED and (value == link.descriptor or (link.dials and link.connected)):
            self._ended(rank, link)
        elif event == zmq.EVENT_DISCONNECTED and link.dials:
            link.failures += 1
            if link.failures > TRIES and link.refused:
                raise RunError(self._another_key(name, here))
            if link.failures > TRIES:
                raise RunError(
                    f"{here} is not where member {name} listens, but something else; give the address of {name}, and"
                    f" let {mine} reach it"
                )

    def _another_key(self, name: str, here: str) -> str:
        return (
            f"member {name} at {here} has another key of the fleet than {self.members[self.rank]!r}: give all members"
            " the same folder of the plan, its file fleet.key included"
        )

    def _ended(self, rank: int, link: Link) -> None:
        name = repr(self.members[rank])
        if self.rank != self.hub:
            before = "before all members had come" if rank == self.hub else "before all members had met"
            raise RunError(f"member {name} has ended {before}; start all again")
        if link.whole:
            self.say(f"member {name} has gone again")
        link.connected, link.descriptor, link.words, link.whole = False, None, None, False
        self._poller.register(link.socket, zmq.POLLIN)

    def _words(self) -> dict[str, Any]:
        """What this member says of itself to another: its plan, and where it listens for whom."""
        ports = {other: int(link.endpoint.rpartition(":")[2]) for other, link in self.links.items() if not link.dials}
        return {"plan": self.plan, "ports": ports}

    def _hear(self, rank: int, link: Link, frame: Any) -> None:
        """Take what a member says: first of itself, then, if it is the hub, of the others."""
        words: dict[str, Any] = json.loads(frame.bytes)
        if link.words is not None:
            self._news = words
            if "error" in words:
                raise RunError(str(words["error"]))
            return
        name, other = repr(self.members[rank]), "it runs another plan of the fleet; copy the plan's folder again"
        why = words.get("error") or ("" if words.get("plan") == self.plan else other)
        link.descriptor = frame.get(zmq.SRCFD)
        if not link.dials:
            send_words(link.socket, {**self._words(), "error": why})
        if why and link.dials:
            raise RunError(f"member {name} at {link.endpoint[6:]} does not let {self.members[self.rank]!r} in: {why}")
        if why:
            self.say(f"member {name} was not let in: {why}")
        else:
            link.words, link.whole = {**words, "address": frame.get("Peer-Address")}, True

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(repr(self.members[rank]) for rank in ranks)


def listening(address: str, port: int, whose: str = "this member") -> socket.socket:
    """A socket that listens at an address of this machine. Raises InputError where it is none, or is taken."""
    host = _resolved(address, whose)
    try:
        return socket.create_server((host, port), family=_family(host), backlog=BACKLOG)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            raise InputError(
                f"{address} is no address of this machine: {whose} listens there, so that it has to be one of its own,"
                " which the others reach"
            ) from error
        raise InputError(
            f"{address}:{port}: nobody can listen there ({error.strerror}); end what does, or give another port"
        ) from error


def _hear_nobody(listener: socket.socket) -> None:
    """Have the kernel drop whatever comes for a socket that listens, but not for connections that it has made: ZeroMQ
    would end those with the listening.
    """
    code = ctypes.create_string_buffer(struct.pack("=HBBI", RETURN, 0, 0, 0))
    with suppress(OSError):  # without it strangers are not let in either, but take a moment each
        program = struct.pack("@HP", 1, ctypes.addressof(code))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def send_words(link: Any, words: dict[str, Any]) -> None:
    """Send what JSON can hold, unless the other has ended."""
    data = json.dumps(words).encode()
    assert len(data) <= FRAME_BYTES
    with suppress(zmq.Again):
        link.send(data, zmq.NOBLOCK)


def received(link: Any) -> Any:
    """The next frame that has come on a link; None where there is none."""
    try:
        return link.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None


def _resolved(address: str, whose: str) -> str:
    """An address in numbers. Raises InputError where it is none."""
    try:
        return str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"{address}: no such host ({error}); give an address of {whose}") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _own_address(host: str, port: int) -> str | None:
    """The address of this machine from which another one is reached; None while there is no way to it."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # sends nothing
        except OSError:
            return None
        return str(probe.getsockname()[0])
