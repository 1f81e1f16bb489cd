"""The application: routes over a store, a supervisor and the page. `create_app` makes it, `serve` runs it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from tightfit.planner.service.http import routes, routes_machine, routes_page
from tightfit.planner.service.http.connections import Connections, loop_of, most_connections, protocol_of
from tightfit.planner.service.http.described import EVERYWHERE
from tightfit.planner.service.http.example import give_example
from tightfit.planner.service.http.guard import OPEN, Guard
from tightfit.planner.service.http.logs import log_to_stderr
from tightfit.planner.service.http.routes import check_query
from tightfit.planner.service.http.service import Service, opened
from tightfit.planner.service.http.tls import server_context
from tightfit.planner.service.wire.errors import Code, ServiceError, UnreadableError, error_json
from tightfit.planner.service.wire.settings import Settings, installed_version, loopback
from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.common.option_names import in_python, named_as

DESCRIPTION = """Fit training into the memory you have: profiles in, plans out, with a proven gap.

Long work answers 202 with a job; its events are at `/v1/jobs/{id}/events`. A repeated request is the same job. A budget
that is too small is a result (`status: infeasible`, with the smallest budget that is enough), not an error. Every error
has one form.

**Who asks.** Whoever has the token is one user: jobs, idempotency keys and the queue are shared. Without a token there
is one user, at this machine.

**In time.** A request's headers must come within 10 s and its body within 60 s, else the answer is 408. A body has at
most 256 KiB, an uploaded profile or the description of a model 64 MiB unpacked, with at most 250,000 operators and
1,000,000 tensors in all of its layers, else the answer is 413 or 422. Where too many connections are open, those that
have waited for their client for longest give way to new ones."""
CODES: dict[int, Code] = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
WAITING_CONNECTIONS = 1024
"""connections that the kernel holds until they are accepted"""
ACCEPTED_AT_ONCE = 32
"""connections that are accepted before what the latest have sent is read: few, or they would look as if they had sent
nothing
"""
ROUTERS = (routes.router, routes_machine.router, routes_page.router)
log = logging.getLogger("tightfit.service")


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """The application, over a `service` that is open, or over that of `settings`, which is opened when it starts."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        with opened(settings) if service is None else contextlib.nullcontext(service) as ready:
            app.state.service = ready
            await ready.supervisor.start()
            await give_example(ready)
            try:
                yield
            finally:
                await ready.supervisor.stop()

    app = FastAPI(
        title="tightfit",
        version=installed_version(),
        description=DESCRIPTION,
        lifespan=life,
        docs_url=None,  # its page would come from elsewhere
        redoc_url=None,
        responses=EVERYWHERE,
    )
    app.add_middleware(Guard, settings=settings)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(UnreadableError, _unreadable_error)
    app.add_exception_handler(TightfitError, _library_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(check_query)])
    undescribed = app.openapi
    app.openapi = lambda: _with_token(undescribed())  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _with_token(described: dict[str, Any]) -> dict[str, Any]:
    """The API's description, with the token that a service may ask for."""
    text = "needed where the service was started with TIGHTFIT_TOKEN"
    scheme = {"type": "http", "scheme": "bearer", "description": text}
    described["components"]["securitySchemes"] = {"token": scheme}
    for path, methods in described["paths"].items():
        for operation in methods.values():
            operation["security"] = [{}] if path.startswith(OPEN) else [{"token": []}, {}]
    return described


def serve(settings: Settings) -> None:
    """Answer until interrupted. Errors name options as requests do.

    Raises InputError where the certificate, the data folder or the port cannot be had, and StorageError where the
    folder's disk is full.
    """
    context = None if settings.certificate is None else server_context(settings.certificate, settings.key)
    log_to_stderr()
    with opened(settings) as service, named_as(in_python):
        _serve_until_interrupted(settings, service, context)


def _serve_until_interrupted(settings: Settings, service: Service, context: ssl.SSLContext | None) -> None:
    """Bind the port and answer there until interrupted. Raises InputError where the port cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio turns off Nagle's algorithm: else every answer waits 40 ms for an
    # acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
        listener.listen(WAITING_CONNECTIONS)  # who comes before the application is up waits, instead of being refused
    except OSError as error:
        raise InputError(
            f"--host {settings.host} --port {settings.port}: {error.strerror or error}; name another --port"
        ) from error
    host, port = listener.getsockname()[:2]
    scheme = "http" if context is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"
    log.info("serving", extra={"url": url, "data": str(settings.data_dir)})
    if context is None and not loopback(settings.host):
        log.warning(
            "tokens pass in the clear: without --certificate, clients of tightfit send none but through an ssh tunnel"
        )
    app = create_app(settings, service)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.events.close()  # else it would wait for streams that wait for jobs
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listener.listen(WAITING_CONNECTIONS)  # uvicorn has just made it as many as are accepted at once
            if sys.stderr.isatty():  # after the log's lines, what a person looks for
                sys.stderr.write(f"tightfit: open {url} in a browser; Ctrl-C ends the service\n")

    config = uvicorn.Config(
        app,
        loop=loop_of(context),
        http=protocol_of(Connections(most_connections()), context),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        backlog=ACCEPTED_AT_ONCE,
        proxy_headers=False,  # else a client could claim any address
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn ends on them, and raises them once more at the end
    Server(config).run(sockets=[listener])


# --- errors: one form -------------------------------------------------------------------------------------------------


def error_response(status: int, code: Code, message: str, fields: Sequence[tuple[str, str]] = ()) -> Response:
    headers = {"Retry-After": "30"} if status == 429 else None
    body = error_json(code, message, fields)
    return Response(body, status_code=status, media_type="application/json", headers=headers)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(error.status, error.code, str(error), error.fields)


async def _unreadable_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UnreadableError)
    return await _service_error(request, request.app.state.service.store.damaged(error.digest, str(error)))


async def _library_error(request: Request, error: Exception) -> Response:
    message = request.app.state.service.redaction.text(str(error))
    if isinstance(error, RunError):  # nothing was wrong with the request
        log.error("not stored", extra={"why": str(error)})
        return error_response(507, "storage", message)
    return error_response(422, "invalid_request", message, [("body", message)])


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults: list[dict[str, Any]] = list(error.errors())
    fields = [
        (
            ".".join(str(part) for part in fault["loc"]),
            (
                f"not JSON ({fault['ctx']['error']})"
                if fault["type"] == "json_invalid"
                else str(fault["msg"]).removeprefix("Value error, ")
            ),
        )
        for fault in faults[:20]
    ]
    not_json = any(fault["type"] == "json_invalid" for fault in faults)
    message = "; ".join(f"{field}: {text}" for field, text in fields[:3])
    return error_response(400 if not_json else 422, "invalid_request", message, fields)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404:
        if "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1/"):
            return routes_page.nowhere()
        message = f"there is nothing at {request.url.path}; /openapi.json tells what there is"
    elif error.status_code == 405:
        methods = _methods(request, headers.get("Allow", ""))
        message = f"{request.method} is not for {request.url.path}; send {' or '.join(methods)}"
        headers["Allow"] = ", ".join(methods)
    response = error_response(error.status_code, CODES.get(error.status_code, "invalid_request"), message)
    response.headers.update(headers)
    return response


def _methods(request: Request, first: str) -> list[str]:
    """The methods of all routes with the path of a request: Starlette knows those of the `first` one alone."""
    routes = [
        route for router in ROUTERS for route in router.routes if route.matches(request.scope)[0] is not Match.NONE
    ]
    return sorted(
        {
            *filter(None, first.split(", ")),
            *(method for route in routes for method in getattr(route, "methods", None) or ()),
        }
    )


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(500, "internal", "internal error; the service's log tells more")
