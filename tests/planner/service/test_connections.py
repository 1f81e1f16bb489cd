"""Connections that send nothing, too little or too slowly, or read nothing: each ends, and none keeps others out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import socket
import ssl
import subprocess
import sys
import threading
import time

import httpx
import pytest
import uvicorn
from certificates import self_signed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from served import Served
from synthetic import decoder_like

from tightfit.planner.service.client import connect
from tightfit.planner.service.http import connections, guard
from tightfit.planner.service.http.connections import Connections, loop_of, most_connections, protocol_of
from tightfit.planner.service.http.guard import Guard
from tightfit.planner.service.http.tls import server_context
from tightfit.planner.service.wire.settings import Settings
from tightfit.runtime.common.interpreter import command, python_path

PATIENCE = 30.0
"""seconds"""
HALF = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LARGE = 64 << 20
"""bytes of an answer that no kernel takes without a reader"""


async def answer(scope, receive, send):
    """Tells how long the body was; a large body under /large, one that waits under /wait, and one that has begun and
    waits for its end under /stream.
    """
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
    if scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await asyncio.to_thread(scope["state"]["waiting"].wait, PATIENCE)
    for start in range(0, len(body), 1 << 20):
        part = body[start : start + (1 << 20)]
        await send({"type": "http.response.body", "body": part, "more_body": start + len(part) < len(body)})


@contextlib.contextmanager
def listening(tmp_path, most=8, context=None):
    """(address, open connections, an event that ends what waits) of a server in a thread of its own, under TLS with a
    `context`.
    """
    waiting, open_now = threading.Event(), Connections(most)

    async def app(scope, receive, send):
        await guarded({**scope, "state": {"waiting": waiting}}, receive, send)

    guarded = Guard(answer, Settings(data_dir=tmp_path, command=(sys.executable,)))
    config = uvicorn.Config(
        app,
        loop=loop_of(context),
        http=protocol_of(open_now, context),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
    )
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
    return sum(not one.waits for one in list(open_now._open))


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


@pytest.fixture
def tls(tmp_path):
    """What a service speaks TLS with, and what its clients trust."""
    certificate = self_signed(tmp_path / "certificate.pem", "127.0.0.1")
    return server_context(certificate, None), ssl.create_default_context(cafile=certificate)


def test_a_handshake_that_does_not_come_to_its_end_ends_the_connection(tmp_path, tls, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    context, trusted = tls
    with listening(tmp_path, context=context) as (address, open_now, _):
        silent, half, plain = (socket.create_connection(address) for _ in range(3))
        half.sendall(bytes.fromhex("16030100c8"))  # of a greeting whose 200 bytes do not come
        plain.sendall(HALF)
        with silent, half, plain:
            until(lambda: len(open_now) > 1)
            assert said(silent) == said(half) == b""
            said(plain)  # an alert of TLS at most
        until(lambda: len(open_now) == 0)
        # Under TLS the limits are those of any connection.
        with trusted.wrap_socket(socket.create_connection(address), server_hostname="127.0.0.1") as slow:
            slow.sendall(HALF)
            assert refusal(slow) == (408, "request_timeout")
        with httpx.Client(base_url="https://{}:{}".format(*address), verify=trusted, trust_env=False) as http:
            assert http.post("/echo", json={}).text == "2"
            assert len(open_now) == 1
        until(lambda: len(open_now) == 0)


def test_handshakes_give_way_to_new_connections_but_requests_do_not(tmp_path, tls):
    context, trusted = tls
    with contextlib.ExitStack() as stack:
        address, open_now, waiting = stack.enter_context(listening(tmp_path, most=4, context=context))
        url = "https://{}:{}".format(*address)
        for _ in range(12):
            stack.enter_context(socket.create_connection(address))
        for _ in range(3):
            assert httpx.get(f"{url}/", verify=trusted, trust_env=False, timeout=PATIENCE).text == "0"
        assert len(open_now) <= 4
        http = stack.enter_context(httpx.Client(base_url=url, verify=trusted, trust_env=False, timeout=PATIENCE))
        askers = [threading.Thread(target=http.get, args=("/wait",)) for _ in range(4)]
        for asker in askers:
            asker.start()
        until(lambda: at_work(open_now) == 4)
        assert said(stack.enter_context(socket.create_connection(address))) == b""
        waiting.set()
        for asker in askers:
            asker.join(PATIENCE)


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


SENT = {
    "nothing": b"",
    "half of the headers": HALF,
    "a slow body": HALF + b"Content-Length: 100\r\n\r\n{",
    "a stream": b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an answer that is not read": b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "one answer": HALF + b"Content-Length: 2\r\n\r\n{}",
}
"""what a client has sent that lets the service wait"""


@pytest.mark.slow
@settings(max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(kinds=st.lists(st.sampled_from(sorted(SENT)), min_size=8, max_size=24))
@example(kinds=["a stream"] * 24)
@example(kinds=["a slow body"] * 24)
def test_idle_and_slow_connections_give_way_to_new_ones(tmp_path_factory, kinds):
    """512 event streams, or bodies that came slowly, kept everybody at their address out."""
    with (
        listening(tmp_path_factory.mktemp("s"), most=8) as (address, open_now, waiting),
        contextlib.ExitStack() as stack,
    ):
        working = stack.enter_context(socket.create_connection(address))
        working.sendall(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: at_work(open_now) == 1)
        for kind in kinds:
            slow = stack.enter_context(socket.create_connection(address))
            with contextlib.suppress(ConnectionError):
                slow.sendall(SENT[kind])
        until(lambda: len(open_now) == 8)
        until(lambda: at_work(open_now) == 1)
        base = "http://{}:{}".format(*address)
        for _ in range(10):
            with httpx.Client(base_url=base, trust_env=False, timeout=PATIENCE) as http:
                assert http.post("/echo", json={}).text == "2"
        assert len(open_now) <= 8
        waiting.set()  # what the service was at has kept its place
        working.settimeout(PATIENCE)
        assert working.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_where_all_are_at_work_a_new_one_is_told_to_come_later(tmp_path):
    with listening(tmp_path, most=4) as (address, open_now, waiting), contextlib.ExitStack() as stack:
        busy = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
        for connection in busy:
            connection.sendall(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: at_work(open_now) == 4)
        refused = httpx.get("http://{}:{}/echo".format(*address), trust_env=False, timeout=PATIENCE)
        assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (
            503,
            "busy",
            "30",
        )
        waiting.set()
        for connection in busy:
            connection.settimeout(PATIENCE)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


class Standing:
    """Stands for a connection."""

    def __init__(self, since, *, waits=True):
        self.since, self.waits = since, waits
        self.transport, self.ended = self, False

    def abort(self):
        self.ended = True


def test_the_connection_that_has_waited_longest_gives_way():
    every = Connections(4)
    first = [Standing(2.0), Standing(0.0, waits=False), Standing(3.0), Standing(1.0)]
    assert all(map(every.enter, first))
    for since, ends in ((4.0, 3), (5.0, 0), (6.0, 2)):
        new = Standing(since)
        before = [one.ended for one in first]
        assert every.enter(new)
        assert [one.ended for one in first] == [now or number == ends for number, now in enumerate(before)]
        assert not new.ended
    assert len(every) == 4
    for one in list(every._open):
        one.waits = False
    assert not every.enter(Standing(8.0))
    every.leave(first[0])  # it has left already
    every.leave(first[1])
    assert len(every) == 3
    assert every.enter(Standing(9.0))


def test_connections_fit_into_the_files_that_may_be_open(monkeypatch):
    for files, most in (
        (1024, 512),
        (1 << 20, connections.MOST),
        (connections.resource.RLIM_INFINITY, connections.MOST),
    ):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, files=files: (files, files))
        assert most_connections() == most


@pytest.mark.slow
def test_a_thousand_connections_that_wait_keep_nobody_out(tmp_path):
    service = Served(tmp_path / "data").start()
    try:
        address = service.http.base_url.host, service.http.base_url.port
        budgets = [f"{1000 + 8 * step}MiB" for step in range(40)]
        job = service.ask("/v1/comparisons", profile=service.upload(decoder_like(24)), memory=budgets)["id"]
        sent = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                slow = stack.enter_context(socket.create_connection(address))
                with contextlib.suppress(ConnectionError):
                    slow.sendall(sent)
            for _ in range(3):
                assert httpx.get(f"{service.url}/healthz", trust_env=False, timeout=PATIENCE).status_code == 200
            with connect(service.url) as client:
                assert next(client.events(job))[0] == "job"
        # Who asks cannot call itself by another address.
        service.http.get("/healthz", headers={"X-Forwarded-For": "192.0.2.1"})
        service.http.post(f"/v1/jobs/{job}/cancel")
    finally:
        assert service.stop() == 0
    assert {line["client"] for line in service.lines() if line["message"] == "request"} == {"127.0.0.1"}
    assert not [line for line in service.lines() if line["level"] == "error"]


def test_a_person_at_a_terminal_is_told_what_to_open(tmp_path):
    """As the last of what is printed at the start; between the lines of the log the address was overlooked."""
    terminal, end = pty.openpty()
    words = [
        *command("tightfit.runtime.cli.main"),
        "serve",
        "--data-dir",
        str(tmp_path / "data"),
        "--port",
        "0",
        "--no-example",
    ]
    served = subprocess.Popen(
        words, stderr=end, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": python_path()}
    )
    os.close(end)
    try:
        seen = b""
        while b"Ctrl-C ends" not in seen:
            seen += os.read(terminal, 4096)
        line = next(line for line in seen.decode().splitlines() if line.startswith("tightfit: "))
        address = line.removeprefix("tightfit: open ").split()[0]
        assert httpx.get(address, follow_redirects=True).headers["content-type"].startswith("text/html")
    finally:
        served.kill()
        served.wait()
        os.close(terminal)
