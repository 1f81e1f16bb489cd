"""Limits on connections: how many may be open, how long a request may take to arrive, how long an answer to be read.

uvicorn only limits the total and waits for a request for ever, so a client that opens a thousand connections and sends
nothing, or a byte now and then, would keep out everybody else. Here each is closed if its request does not arrive in
time, and where too many are open a new one takes the place of one that waits for its client. `Guard` limits the time
that a request's body takes.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
from asyncio.sslproto import SSLProtocol
from typing import Any, ClassVar, Literal

from uvicorn.protocols.http.h11_impl import H11Protocol

from tightfit.planner.service.wire.errors import Code, error_json

HEAD_SECONDS = 10.0
"""time for a request's headers, from the start of the connection or the first byte of a further request on it"""
READ_SECONDS = 60.0
"""time within which a client must take some of an answer that does not fit into the kernel's buffer"""
MOST = 1024


def most_connections() -> int:
    """How many connections fit into the files that this process may have open, with room for its own."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if files == resource.RLIM_INFINITY else max(2, min(MOST, files // 2))


class Connections:
    """The open connections."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: set[Connection | TlsConnection] = set()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection | TlsConnection) -> bool:
        """Whether there is room for a new connection, perhaps in the place of the one that has waited longest for its
        client.
        """
        if len(self) >= self.most:
            waiting = [connection for connection in self._open if connection.waits]
            if not waiting:
                return False
            slowest = min(waiting, key=lambda connection: connection.since)
            self.leave(slowest)
            slowest.transport.abort()
        self._open.add(connection)
        return True

    def leave(self, connection: Connection | TlsConnection) -> None:
        self._open.discard(connection)


class Connection(H11Protocol):
    """One connection; `protocol_of` makes the class that knows the others."""

    others: ClassVar[Connections]
    beneath: TlsConnection | None = None
    """the TLS that it is spoken under"""
    since = 0.0
    """loop time at which the latest request's first byte came, the latest answer ended, or the connection began"""
    _refused = False
    _request_begun = False
    """whether some of a request has come that is not answered"""
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request has come whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]  # None at first

    @property
    def waits(self) -> bool:
        """Whether it waits for its client: to send a request, the rest of one, or to take an answer, such as a job's
        events.
        """
        return not self.busy or self.cycle.more_body or self.cycle.response_started

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if self.beneath is not None:
            self.others.leave(self.beneath)
        self.since = self.loop.time()
        if self.others.enter(self):
            self._start_head_timer()
        else:
            self._refused = True
            self._refuse(503, "busy", f"{len(self.others)} requests are at work already; try again in a minute")

    def connection_lost(self, exc: Exception | None) -> None:
        self.others.leave(self)
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not self._request_begun:
            self.since, self._request_begun = self.loop.time(), True
        super().data_received(data)
        if not self.busy:
            self._start_head_timer()
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_response_complete(self) -> None:
        self.since, self._request_begun = self.loop.time(), False
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _start_head_timer(self) -> None:
        """Limit the time in which the next request's headers must come."""
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_timed_out)

    def _head_timed_out(self) -> None:
        self._head_timer = None
        if self.busy or self.transport.is_closing():
            return
        if self._request_begun:
            self._refuse(408, "request_timeout", f"the request's headers did not come within {HEAD_SECONDS:.0f} s")
        else:  # a browser opens connections that it may need
            self.transport.close()

    def _refuse(self, status: int, code: Code, message: str) -> None:
        body = error_json(code, message)
        head = (
            f"HTTP/1.1 {status} {code}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection:"
            " close\r\n"
        )
        retry = "Retry-After: 30\r\n" if status == 503 else ""
        self.transport.write(f"{head}{retry}\r\n".encode() + body)
        self.transport.close()


class TlsConnection(SSLProtocol):
    """TLS below a `Connection`, from its first byte on: one that does not come to an end of its handshake counts among
    the open ones, gives way to new ones, and is closed in time. uvicorn's own TLS would be seen by nobody until then.
    """

    waits = True
    """whether it waits for its client: to the end of the handshake, when the connection above it takes its place"""
    since = 0.0
    transport: asyncio.Transport

    def __init__(self, connection: Connection, context: ssl.SSLContext) -> None:
        nobody: Any = None  # waits for the end of the handshake
        seconds: Any = HEAD_SECONDS  # may have fractions
        super().__init__(connection.loop, connection, context, nobody, server_side=True, ssl_handshake_timeout=seconds)
        self._above = connection
        connection.beneath = self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.since = transport, self._above.loop.time()
        if self._above.others.enter(self):
            super().connection_made(transport)
        else:  # an answer would take a handshake
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._above.others.leave(self)
        super().connection_lost(exc)


def loop_of(context: ssl.SSLContext | None) -> Literal["auto", "asyncio"]:
    """The event loop that uvicorn is to use: any, but asyncio's own for a `TlsConnection`."""
    return "auto" if context is None else "asyncio"


def protocol_of(connections: Connections, context: ssl.SSLContext | None = None) -> Any:
    """Makes what uvicorn is to speak on a new connection; under TLS where there is a `context` for it."""

    class CountedConnection(Connection):
        others = connections

    def under_tls(**given: Any) -> TlsConnection:
        assert context is not None
        return TlsConnection(CountedConnection(**given), context)

    return CountedConnection if context is None else under_tls
