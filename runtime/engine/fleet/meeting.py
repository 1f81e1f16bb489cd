"""How the members of a fleet come together: one listens, the others dial it, and each proves that it has the fleet's
key.

The key lies in the folder of the fleet's plan. Whoever dials is sent a challenge and answers with a keyed hash of it
(HMAC-SHA256); the one that listens proves itself the same way. Until then at most `PROOF_BYTES` are read from anybody,
and nothing of them is looked at. Once all have met, nobody listens any more. Two members share two connections: one for
messages, one for signs of life.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tightfit.runtime.common.errors import InputError, RunError

MAGIC = b"tightfit fleet 1"
NONCE_BYTES, HASH_BYTES, WORDS_BYTES = 32, 32, 256
CHALLENGE_BYTES = len(MAGIC) + NONCE_BYTES
PROOF_BYTES = NONCE_BYTES + WORDS_BYTES + HASH_BYTES
"""what a member sends to be let in: a challenge of its own, who it is, and the hash; the reply is as long"""
REFUSED = b"\0" * HASH_BYTES
"""in the place of the reply's hash: the key is another one"""
CONTROL, DATA = "control", "data"
"""the two connections of two members: signs of life, and messages"""
FRAME_BYTES = 1 << 16
"""of a frame on the control connection, at most"""
LOOK_SECONDS = 0.1
"""between two looks whether the others have come, and whether a signal has"""
DIAL_SECONDS = 3.0
"""until another member answers, at most; then it is dialled again"""
PROOF_SECONDS = 10.0
"""that somebody who has dialled has to prove who it is"""
MOST_UNPROVEN = 64
"""that may be about to prove who they are; one more, and the oldest is sent away"""
SAY_SECONDS = 10.0
"""between two lines about who is waited for"""


@dataclass
class PeerConnections:
    """The connections to another member."""

    sockets: dict[str, socket.socket] = field(default_factory=dict)
    port: int = 0
    """where it listens for others"""

    @property
    def whole(self) -> bool:
        return len(self.sockets) == 2

    def close(self) -> None:
        for one in self.sockets.values():
            one.close()


def listening(address: str, port: int, whose: str = "this member") -> socket.socket:
    """A socket that listens at an address of this machine. Raises InputError where it is none, or is taken."""
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=MOST_UNPROVEN)
    except socket.gaierror as error:
        raise InputError(f"{address}: no such host ({error.strerror}); give an address of {whose}") from error
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            raise InputError(
                f"{address} is no address of this machine: {whose} listens there, so that it has to be one of its own,"
                " which the others reach"
            ) from error
        raise InputError(
            f"{address}:{port}: nobody can listen there ({error.strerror}); end what does, or give another port"
        ) from error


class Meeting:
    """This member's side of the meeting; `meet` returns the connections to each of the others, by their number."""

    def __init__(
        self,
        members: Sequence[str],
        rank: int,
        hub: int,
        key: bytes,
        *,
        timeout: float,
        plan: str,
        stopping: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        """`hub`: number of the member that the others dial first; `plan`: what all have to be members of."""
        self.members, self.rank, self.hub, self.key = members, rank, hub, key
        self.timeout, self.stopping, self.say = timeout, stopping, say
        self.plan = hashlib.sha256(plan.encode()).hexdigest()
        self.links: dict[int, PeerConnections] = {}
        self._listener: socket.socket | None = None
        self._unproven: dict[socket.socket, tuple[float, bytes, bytearray]] = {}
        """those that have dialled: when, the challenge they were sent, and what they have answered"""
        self._end = time.monotonic() + timeout
        self._said = time.monotonic()
        self._strangers: set[str] = set()

    def meet(self, address: str, port: int) -> dict[int, PeerConnections]:
        """Meet the others at `address`, where the hub listens.

        Raises InputError for an address that cannot be, RunError where somebody does not come in time or has another
        key, and where this process is asked to end meanwhile.
        """
        try:
            if len(self.members) > 1:
                if self.rank == self.hub:
                    self._gather(address, port)
                else:
                    self._come(address, port)
            return self.links
        except BaseException as error:
            if self.rank == self.hub:  # it alone knows who has not come
                self._tell({"error": str(error)})
            for links in self.links.values():
                links.close()
            raise
        finally:
            for one in self._unproven:
                one.close()
            if self._listener:
                self._listener.close()

    # --- the member that listens ------------------------------------------------------------------------------------

    def listen(self, address: str, port: int) -> int:
        """Listen from now on; returns the port."""
        if self._listener is None:
            self._listener = listening(address, port, f"member {self.members[self.rank]!r}, this one,")
            self._listener.setblocking(False)
        return int(self._listener.getsockname()[1])

    def _gather(self, address: str, port: int) -> None:
        port = self.listen(address, port)
        others = [rank for rank in range(len(self.members)) if rank != self.rank]

        def missing() -> list[int]:
            return [rank for rank in others if rank not in self.links or not self.links[rank].whole]

        told: list[int] = []
        while absent := missing():
            if absent != told:
                told = absent
                self._tell({"absent": absent})
            names = self._names(absent)
            self._look(f"has waited at {address}:{port} for {names}, who did not come", names)
            self._admit(others)
            for rank in [rank for rank, links in self.links.items() if links.whole and _ended(links.sockets[CONTROL])]:
                self.say(f"member {self.members[rank]!r} has gone again")
                self.links.pop(rank).close()
        places = {rank: [links.sockets[CONTROL].getpeername()[0], links.port] for rank, links in self.links.items()}
        self._tell({"places": places})

    def _tell(self, frame: dict[str, Any]) -> None:
        for links in self.links.values():
            with suppress(OSError, KeyError):
                send_frame(links.sockets[CONTROL], frame)

    def _admit(self, awaited: Sequence[int]) -> None:
        """Hear those that dial and let in who is awaited and proves to be a member; waits a moment where nobody
        does.
        """
        assert self._listener
        ready, _, _ = select.select([self._listener, *self._unproven], [], [], LOOK_SECONDS)
        for one in ready:
            if one is self._listener:
                with suppress(OSError):
                    self._challenge(*self._listener.accept())
            elif one in self._unproven:
                _, challenge, answer = self._unproven[one]
                try:
                    said = one.recv(PROOF_BYTES - len(answer))
                except OSError:
                    said = b""
                answer += said
                if not said or len(answer) == PROOF_BYTES:
                    del self._unproven[one]
                    if not said or not self._proven(one, challenge, bytes(answer), awaited):
                        one.close()
        oldest = time.monotonic() - PROOF_SECONDS
        for one in [one for one, (came, _, _) in self._unproven.items() if came < oldest]:
            del self._unproven[one]
            one.close()

    def _challenge(self, one: socket.socket, _: Any) -> None:
        if len(self._unproven) >= MOST_UNPROVEN:
            first = next(iter(self._unproven))
            del self._unproven[first]
            first.close()
        one.settimeout(DIAL_SECONDS)
        challenge = os.urandom(NONCE_BYTES)
        one.sendall(MAGIC + challenge)
        self._unproven[one] = time.monotonic(), challenge, bytearray()

    def _proven(self, one: socket.socket, challenge: bytes, answer: bytes, awaited: Sequence[int]) -> bool:
        """Whether the answer is a member's, which then has its place; it is told why not."""
        theirs, words, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:-HASH_BYTES], answer[-HASH_BYTES:]
        with suppress(OSError):
            if not hmac.compare_digest(proof, self._hash(b"dials", challenge, theirs, words)):
                place = one.getpeername()[0]
                if place not in self._strangers and len(self._strangers) < MOST_UNPROVEN:
                    self._strangers.add(place)
                    self.say(f"{place} was not let in: it does not have the key of this fleet's plan")
                one.sendall(bytes(NONCE_BYTES + WORDS_BYTES) + REFUSED)
                return False
            told = json.loads(words)
            rank, kind = told["rank"], told["kind"]
            links = self.links.setdefault(rank, PeerConnections()) if rank in awaited else PeerConnections()
            why = ""
            if told["plan"] != self.plan:
                why = "it runs another plan of the fleet; copy the plan's folder again"
            elif rank not in awaited:
                why = "nobody waits for it here"
            elif kind in links.sockets and not _ended(links.sockets[CONTROL]):
                why = f"it is there already, from {links.sockets[kind].getpeername()[0]}; start each member once"
            reply = json.dumps({"error": why}).encode().ljust(WORDS_BYTES)
            one.sendall(bytes(NONCE_BYTES) + reply + self._hash(b"listens", theirs, challenge, reply))
            if not why:
                if kind in links.sockets:
                    links.close()
                    links.sockets.clear()
                links.sockets[kind], links.port = one, told["port"]
            return not why
        return False

    # --- the members that dial --------------------------------------------------------------------------------------

    def _come(self, address: str, port: int) -> None:
        hub, last = self.hub, len(self.members) - 1
        below = [rank for rank in range(self.rank) if rank != hub]
        above = [rank for rank in range(self.rank + 1, last + 1) if rank != hub]
        while why := self._dial(hub, address, port, listens=bool(above)):
            self._look(f"did not reach {self.members[hub]!r} at {address}:{port} ({why})", self._names([hub]))
            time.sleep(LOOK_SECONDS)
        places = self._places()
        for rank in below:
            while why := self._dial(rank, *places[str(rank)]):
                where = "{}:{}".format(*places[str(rank)])
                self._look(f"did not reach {self.members[rank]!r} at {where} ({why})", self._names([rank]))
                self._others_stay()
                time.sleep(LOOK_SECONDS)
        while absent := [rank for rank in above if rank not in self.links or not self.links[rank].whole]:
            names = self._names(absent)
            self._look(f"was not reached by {names}", names)
            self._admit(above)
            self._others_stay()

    def _dial(self, rank: int, address: str, port: int, *, listens: bool = False) -> str:
        """Make both connections to a member; "" or why it cannot be done yet. Raises RunError where it never will."""
        links = PeerConnections()
        try:
            for kind in (CONTROL, DATA):
                one = socket.create_connection((address, port), timeout=DIAL_SECONDS)
                links.sockets[kind] = one
                own = self.listen(one.getsockname()[0], 0) if listens else 0
                self._prove(one, rank, {"rank": self.rank, "kind": kind, "port": own, "plan": self.plan})
        except OSError as error:
            links.close()
            return error.strerror or str(error) or type(error).__name__
        except BaseException:
            links.close()
            raise
        self.links[rank] = links
        return ""

    def _prove(self, one: socket.socket, rank: int, words: dict[str, Any]) -> None:
        """Prove to the member at the other end who this is, and have it prove the same. Raises OSError where nobody
        answers, RunError where it is none of the fleet, or does not let this one in.
        """
        name, here = repr(self.members[rank]), "{}:{}".format(*one.getpeername()[:2])
        said = _exactly(one, CHALLENGE_BYTES)
        if not said.startswith(MAGIC):
            raise RunError(f"{here} is not where member {name} listens, but something else; give the address of {name}")
        theirs, mine = said[len(MAGIC) :], os.urandom(NONCE_BYTES)
        padded = json.dumps(words).encode().ljust(WORDS_BYTES)
        one.sendall(mine + padded + self._hash(b"dials", theirs, mine, padded))
        reply = _exactly(one, PROOF_BYTES)
        told, proof = reply[NONCE_BYTES:-HASH_BYTES], reply[-HASH_BYTES:]
        if not hmac.compare_digest(proof, self._hash(b"listens", mine, theirs, told)):
            raise RunError(
                f"member {name} at {here} has another key of the fleet than {self.members[self.rank]!r}: give all"
                " members the same folder of the plan, its file fleet.key included"
            )
        if why := json.loads(told)["error"]:
            raise RunError(f"member {name} at {here} does not let {self.members[self.rank]!r} in: {why}")

    def _places(self) -> dict[str, list[Any]]:
        """Where the others listen, which the hub tells once all have come."""
        control, names = self.links[self.hub].sockets[CONTROL], "the others"
        while True:
            ready, _, _ = select.select([control], [], [], LOOK_SECONDS)
            if ready:
                told = receive_frame(control)
                if told is None:
                    raise RunError(
                        f"member {self.members[self.hub]!r} has ended before all members had come; start all again"
                    )
                if "error" in told:
                    raise RunError(str(told["error"]))
                if "places" in told:
                    places: dict[str, list[Any]] = told["places"]
                    return places
                names = self._names(told["absent"])
            self._look(f"has waited with {self.members[self.hub]!r} for {names}, who did not come", names)

    def _others_stay(self) -> None:
        """Raise RunError where a member that had come has ended."""
        for rank, links in self.links.items():
            if links.whole and _ended(links.sockets[CONTROL]):
                raise RunError(f"member {self.members[rank]!r} has ended before all members had met; start all again")

    # --- both -------------------------------------------------------------------------------------------------------

    def _hash(self, side: bytes, *parts: bytes) -> bytes:
        return hmac.digest(self.key, b"".join((MAGIC, side, *parts)), "sha256")

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(repr(self.members[rank]) for rank in ranks)

    def _look(self, what: str, absent: str) -> None:
        """Say from time to time who is waited for, `absent`. Raises RunError once this takes too long, which is `what`
        this member has done, or the process is asked to end.
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


def send_frame(one: socket.socket, content: Any) -> None:
    """Send what JSON can hold over a control connection. Raises OSError."""
    data = json.dumps(content).encode()
    assert len(data) <= FRAME_BYTES
    one.sendall(len(data).to_bytes(4, "little") + data)


def receive_frame(one: socket.socket) -> dict[str, Any] | None:
    """The next frame of a control connection; None where the other side has closed it, or sends no such thing."""
    try:
        size = int.from_bytes(_exactly(one, 4), "little")
        content = json.loads(_exactly(one, size)) if size <= FRAME_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _exactly(one: socket.socket, size: int) -> bytes:
    """So many bytes. Raises OSError where fewer come."""
    data = bytearray()
    while len(data) < size:
        said = one.recv(size - len(data))
        if not said:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        data += said
    return bytes(data)


def _ended(control: socket.socket) -> bool:
    """Whether the other side has closed a control connection."""
    ready, _, _ = select.select([control], [], [], 0)
    try:
        return bool(ready) and not control.recv(1, socket.MSG_PEEK)
    except OSError:
        return True
