"""Limits on connections: how many one network may have, how long a request may take to arrive, how long an answer to be
read.

uvicorn only limits the total and waits for a request for ever, so a client that opens a thousand connections and sends
nothing would keep out everybody else. Here, where too many are open, the oldest connection without a request is closed,
and each is closed if its request does not arrive in time. `Guard` limits the time that a request's body takes.
"""

from __future__ import annotations

import asyncio
import json
import resource
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from tightfit.planner.service.wire.clients import network_of
from tightfit.planner.service.wire.errors import Code

HEAD_SECONDS = 10.0
"""from the start of a connection, or from the first byte of a further request on it, to the end of the request's
headers
"""
READ_SECONDS = 60.0
"""in which a client must take some of an answer that does not fit into the kernel's buffer"""
MOST = 1024
NETWORK_SHARE = 2
"""of all connections, half may be one network's"""


def most_connections() -> int:
    """How many connections fit into the files that this process may have open, with room for its own."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if files == resource.RLIM_INFINITY else max(2, min(MOST, files // 2))


class Connections:
    """All that are open, by network."""

    def __init__(self, most: int) -> None:
        self.most, self.share = most, -(-most // NETWORK_SHARE)
        self._open: dict[str, set[Connection]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def enter(self, new: Connection) -> bool:
        """Whether there is room for a new connection, perhaps in the place of one that has no request."""
        own = self._open.get(new.network, set())
        if len(own) >= self.share and not self._end_one(own):
            return False
        if len(self) >= self.most and not self._end_one(max(self._open.values(), key=len)):
            return False
        self._open.setdefault(new.network, set()).add(new)
        return True

    def leave(self, gone: Connection) -> None:
        own = self._open.get(gone.network, set())
        own.discard(gone)
        if not own:
            self._open.pop(gone.network, None)

    def _end_one(self, candidates: set[Connection]) -> bool:
        """End the one that has been without a request for longest, of those that have never had one
        if there are any.
        """
        idle = [one for one in candidates if not one.busy]
        if not idle:
            return False
        oldest = min(idle, key=lambda one: (one.served > 0, one.idle_since))
        self.leave(oldest)
        oldest.transport.abort()
        return True


class Connection(H11Protocol):
    """One connection; `protocol_of` makes the class that knows the others."""

    others: ClassVar[Connections]
    network = ""
    served = 0
    """requests answered"""
    idle_since = 0.0
    """loop time at which the connection began, or its latest answer ended"""
    _refused = False
    _heard = False
    """whether some of a request has come"""
    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request has come whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]  # None at first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.network = network_of(self.client[0] if self.client else "")
        self.idle_since = self.loop.time()
        if self.others.enter(self):
            self._expect()
        else:
            self._refused = True
            self._end(503, "busy", f"{len(self.others)} connections are open already; try again in a minute")

    def connection_lost(self, exc: Exception | None) -> None:
        self.others.leave(self)
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._heard = True
        super().data_received(data)
        if not self.busy:
            self._expect()
        elif self._late is not None:
            self._late.cancel()
            self._late = None

    def on_response_complete(self) -> None:
        self.idle_since, self._heard = self.loop.time(), False
        self.served += 1
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _expect(self) -> None:
        """A request's headers must have come in a while."""
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        if self.busy or self.transport.is_closing():
            return
        if self._heard:
            self._end(408, "request_timeout", f"the request's headers did not come within {HEAD_SECONDS:.0f} s")
        else:  # a browser opens connections that it may need
            self.transport.close()

    def _end(self, status: int, code: Code, message: str) -> None:
        body = json.dumps({"error": {"code": code, "message": message, "fields": []}}).encode()
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        retry = "Retry-After: 30\r\n" if status == 503 else ""
        self.transport.write(f"{head}{retry}\r\n".encode() + body)
        self.transport.close()


def protocol_of(connections: Connections) -> type[Connection]:
    """The protocol that uvicorn is to speak."""

    class Counted(Connection):
        others = connections

    return Counted
