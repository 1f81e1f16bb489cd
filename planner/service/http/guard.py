"""The middleware before every route: checks who may ask and how much they may send, and logs each request."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tightfit.planner.service.wire.errors import ServiceError, error_json
from tightfit.planner.service.wire.settings import Settings, loopback

OPEN = ("/healthz", "/page/")
"""paths that are answered without a token, as nothing there is anybody's data"""
UPLOADS = frozenset({"/v1/uploads/profile", "/v1/uploads/description"})
"""the paths that take large bodies of JSON"""
DATA = "/v1/uploads/samples"
"""the path that takes files of samples, as they are"""
JSON, BYTES = "application/json", "application/octet-stream"
BODY_SECONDS = 60.0
"""time for a request's body, from the end of its headers on"""
STREAMS = "/events"
"""end of the paths whose answers last as long as their job: HEAD is not answered there"""
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src"
    b" 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", POLICY),
)

log = logging.getLogger("tightfit.requests")


class _GuardedRequest:
    """A request's body as it comes and the answer as it goes: a body that is too large or too slow is answered by a
    refusal.
    """

    def __init__(self, receive: Receive, send: Send, limit: int) -> None:
        self._receive, self._send, self._limit = receive, send, limit
        self._received, self._seconds_left, self._complete = 0, BODY_SECONDS, False
        self._refusal: ServiceError | None = None
        self._started = False
        self.status = 500

    async def receive(self) -> Message:
        """Raises ServiceError for a body that is too large, or too slow to come."""
        if self._complete:
            return await self._receive()
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds_left):
                message = await self._receive()
        except TimeoutError:
            text = f"the body did not come within {BODY_SECONDS:.0f} s"
            self._refusal = ServiceError(408, "request_timeout", text, "body")
            raise self._refusal from None
        self._seconds_left -= time.monotonic() - started
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._received > self._limit:
            self._refusal = _too_large(self._limit)
            raise self._refusal
        return message

    async def send(self, message: Message) -> None:
        if self._refusal is not None:  # sent instead of what the application makes of half a body
            await self.refuse(self._refusal)
            return
        if message["type"] == "http.response.start":
            self.status, self._started = message["status"], True
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await self._send(message)

    async def refuse(self, error: ServiceError) -> None:
        if self._started:
            return
        self.status, self._started = error.status, True
        body = error_json(error.code, str(error), error.fields)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *HEADERS,
        ]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self._send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


class Guard:
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._token = None if settings.token is None else settings.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        # HEAD is answered as GET; the server leaves the body out.
        as_get = scope["method"] == "HEAD" and not scope["path"].endswith(STREAMS)
        routed_scope = {**scope, "method": "GET"} if as_get else scope
        guarded = _GuardedRequest(receive, send, self._limit(scope))
        try:
            self._check(scope)
            await self.app(routed_scope, guarded.receive, guarded.send)
        except ServiceError as error:
            await guarded.refuse(error)
        finally:
            self._note(routed_scope, scope["method"], guarded.status, time.perf_counter() - started)

    def _limit(self, scope: Scope) -> int:
        if scope["path"] == DATA:
            return self.settings.data_bytes
        return self.settings.upload_bytes if scope["path"] in UPLOADS else self.settings.request_bytes

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        path: str = scope["path"]
        host = headers.get(b"host", b"").decode("latin-1")
        if self._token is None:
            name = urlsplit(f"//{host}").hostname if _plain(host) else None
            if name is None or not loopback(name):
                # DNS rebinding: a page elsewhere could point its own name at this machine and send the user's requests.
                message = f"this service answers to localhost, not to {host[:100]!r}; a token opens it to other names"
                raise ServiceError(421, "misdirected", message, "header.Host")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            raise ServiceError(403, "forbidden", "requests of other sites' pages are refused", "header.Origin")
        if self._token is not None and path != "/" and not path.startswith(OPEN):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                message = "send the service's token in the header: Authorization: Bearer TOKEN"
                raise ServiceError(401, "unauthorized", message, "header.Authorization")
        if scope["method"] in {"POST", "PUT", "PATCH"}:
            self._check_body(headers, self._limit(scope), BYTES if path == DATA else JSON)

    def _check_body(self, headers: dict[bytes, bytes], limit: int, expected: str) -> None:
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
        empty = length in (b"", b"0") and b"transfer-encoding" not in headers
        if not empty and media_type != expected:
            message = f"the content type {media_type[:100]!r} is not understood; send {expected}"
            raise ServiceError(415, "unsupported_media_type", message, "header.Content-Type")

    def _note(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", getattr(scope.get("route"), "path", None))
        route = route or ("refused" if status in {401, 403, 421} else "unmatched")
        things = scope.get("path_params", {}).get("things", "")
        client: Any = scope.get("client")
        log.info(
            "request",
            extra={
                "method": method,
                "route": route.replace("{things}", things),
                "status": status,
                "seconds": round(seconds, 6),
                "client": client[0] if client else None,
            },
        )


def _too_large(limit: int) -> ServiceError:
    message = f"the body has more than {limit} bytes, which is the most this service takes"
    return ServiceError(413, "too_large", message, "body")


def _plain(host: str) -> bool:
    """Whether `host` can be split at all: brackets must match."""
    return host.count("[") == host.count("]") <= 1 and "@" not in host
