"""Connections that send nothing, too little or too slowly, or read nothing: each ends, and none keeps others out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time

import httpx
import uvicorn
from served import Served

from tightfit.planner.service.http import connections, guard
from tightfit.planner.service.http.connections import Connections, most_connections, protocol_of
from tightfit.planner.service.http.guard import Guard
from tightfit.planner.service.wire.metrics import Metrics
from tightfit.planner.service.wire.settings import Settings

PATIENCE = 30.0
"""seconds"""
HALF = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LARGE = 64 << 20
"""bytes of an answer that no kernel takes without a reader"""


async def answer(scope, receive, send):
    """Tells how long the body was; a large body under /large, and one that waits under /wait."""
    assert scope["type"] == "http"
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = b"x" * LARGE if scope["path"] == "/large" else str(size).encode()
    if scope["path"] == "/wait":
        await asyncio.to_thread(scope["state"]["waiting"].wait, PATIENCE)
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]}
    )
    for start in range(0, len(body), 1 << 20):
        part = body[start : start + (1 << 20)]
        await send({"type": "http.response.body", "body": part, "more_body": start + len(part) < len(body)})


@contextlib.contextmanager
def listening(tmp_path, most=8):
    """(address, open connections, an event that ends what waits) of a server in a thread of its own."""
    waiting, open_now = threading.Event(), Connections(most)

    async def app(scope, receive, send):
        await guarded({**scope, "state": {"waiting": waiting}}, receive, send)

    guarded = Guard(answer, Settings(data_dir=tmp_path, command=(sys.executable,)), Metrics())
    config = uvicorn.Config(app, http=protocol_of(open_now), lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield bound.getsockname(), open_now, waiting
        finally:
            waiting.set()
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def said(connection):
    """All that comes until the other side closes."""
    connection.settimeout(PATIENCE)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            found += part
    return found


def refusal(connection):
    """(status, code) of an answer that ends the connection."""
    head, _, body = said(connection).partition(b"\r\n\r\n")
    assert b"Connection: close" in head or b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def until(condition):
    patience = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.01)


def at_work(open_now):
    return sum(one.busy for own in list(open_now._open.values()) for one in list(own))


def test_headers_that_do_not_come_end_the_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with listening(tmp_path) as (address, _, _):
        silent, half = (socket.create_connection(address) for _ in range(2))
        half.sendall(HALF)
        with silent, half:
            assert said(silent) == b""  # browsers open connections that they may need
            assert refusal(half) == (408, "request_timeout")
        # Bytes that trickle in do not make it longer.
        with socket.create_connection(address) as trickling:
            trickling.sendall(HALF)
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - began < PATIENCE:
                    trickling.sendall(b"A: b\r\n")
                    time.sleep(0.02)
            assert time.monotonic() - began < PATIENCE


def test_a_further_request_must_come_whole_too(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with listening(tmp_path) as (address, _, _), socket.create_connection(address) as kept:
        kept.sendall(HALF + b"Content-Length: 2\r\n\r\n{}")
        kept.settimeout(PATIENCE)
        assert kept.recv(1 << 16).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)  # between two requests a connection may wait for longer
        kept.sendall(HALF)
        assert refusal(kept) == (408, "request_timeout")


def test_a_body_must_come_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with listening(tmp_path) as (address, _, _), socket.create_connection(address) as slow:
        slow.sendall(HALF + b"Content-Length: 100000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                slow.sendall(b" ")
                time.sleep(0.02)
        assert refusal(slow) == (408, "request_timeout")
        # Whose body is there may wait for its answer for longer.
        with httpx.Client(base_url="http://{}:{}".format(*address), trust_env=False, timeout=PATIENCE) as http:
            assert http.post("/echo", json={}).text == "2"


def test_an_answer_that_nobody_reads_ends_the_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
    with listening(tmp_path) as (address, open_now, _), socket.create_connection(address) as deaf:
        deaf.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: len(open_now) == 1)
        until(lambda: len(open_now) == 0)
        # Who reads slowly, but reads, gets all of it.
        with httpx.Client(base_url="http://{}:{}".format(*address), trust_env=False, timeout=PATIENCE) as http:
            assert len(http.get("/large").content) == LARGE


def test_who_has_too_many_connections_loses_those_without_a_request(tmp_path):
    """A network has half of them; one whose request is there keeps its place, the others give theirs to a new one."""
    with listening(tmp_path, most=8) as (address, open_now, waiting), contextlib.ExitStack() as stack:
        busy = [stack.enter_context(socket.create_connection(address)) for _ in range(2)]
        for connection in busy:
            connection.sendall(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: at_work(open_now) == 2)
        half = [stack.enter_context(socket.create_connection(address)) for _ in range(20)]
        for connection in half:
            with contextlib.suppress(ConnectionError):
                connection.sendall(HALF)
        http = stack.enter_context(
            httpx.Client(base_url="http://{}:{}".format(*address), trust_env=False, timeout=PATIENCE)
        )
        for _ in range(3):
            assert http.get("/echo", headers={"Connection": "close"}).status_code == 200
        assert len(open_now) <= 4
        # With all of them at work a new one is told to come later.
        more = [stack.enter_context(socket.create_connection(address)) for _ in range(2)]
        for connection in more:
            connection.sendall(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: at_work(open_now) == 4)
        refused = http.get("/echo")
        assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (
            503,
            "busy",
            "30",
        )
        waiting.set()
        for connection in (*busy, *more):
            connection.settimeout(PATIENCE)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


class Standing:
    """Stands for a connection of a network."""

    def __init__(self, network, *, busy=False, served=0, idle_since=0.0):
        self.network, self.busy, self.served, self.idle_since = network, busy, served, idle_since
        self.transport, self.ended = self, False

    def abort(self):
        self.ended = True


def test_where_all_places_are_taken_the_largest_network_gives_one():
    every = Connections(4)
    assert every.share == 2
    large = [Standing("a", served=1), Standing("a", idle_since=1.0)]
    small = [Standing("b"), Standing("c", busy=True)]
    assert all(map(every.enter, (*large, *small)))
    new = Standing("d", busy=True)
    assert every.enter(new)
    assert [one.ended for one in (*large, *small)] == [False, True, False, False]  # it had never had a request
    for one in (*large, *small):
        one.busy = True
    assert not every.enter(Standing("e"))
    every.leave(new)
    every.leave(new)
    assert len(every) == 3
    assert every.enter(Standing("e"))
    for one in (*large, *small):
        every.leave(one)
    assert list(every._open) == ["e"]


def test_connections_fit_into_the_files_that_may_be_open(monkeypatch):
    for files, most in (
        (1024, 512),
        (1 << 20, connections.MOST),
        (connections.resource.RLIM_INFINITY, connections.MOST),
    ):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, files=files: (files, files))
        assert most_connections() == most


def test_a_thousand_half_open_connections_keep_nobody_out(tmp_path):
    service = Served(tmp_path / "data").start()
    try:
        address = service.http.base_url.host, service.http.base_url.port
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                half = stack.enter_context(socket.create_connection(address))
                with contextlib.suppress(ConnectionError):
                    half.sendall(b"GET /healthz HTTP/1.1\r\n")
            for _ in range(3):
                assert service.http.get("/healthz").status_code == 200
        # Who asks from this machine cannot call itself by another address.
        service.http.get("/healthz", headers={"X-Forwarded-For": "192.0.2.1"})
    finally:
        assert service.stop() == 0
    assert {line["client"] for line in service.lines() if line["message"] == "request"} == {"127.0.0.1"}
