"""The application: routes over a store, a supervisor and the page. `create_app` makes it, `serve` runs it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import IO, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from tightfit.planner.service.http import (
    routes_fleets,
    routes_jobs,
    routes_page,
    routes_planning,
    routes_profiles,
    routes_runs,
)
from tightfit.planner.service.http.doors import EVERYWHERE
from tightfit.planner.service.http.guard import OPEN, Guard
from tightfit.planner.service.http.uploads import Uploads
from tightfit.planner.service.jobs.store import Store
from tightfit.planner.service.jobs.supervisor import Supervisor
from tightfit.planner.service.wire.errors import Code, ServiceError, UnreadableError
from tightfit.planner.service.wire.events import Events
from tightfit.planner.service.wire.metrics import Metrics
from tightfit.planner.service.wire.objects import Objects
from tightfit.planner.service.wire.redaction import Redaction
from tightfit.planner.service.wire.schema import Error, ErrorAnswer, FieldError
from tightfit.planner.service.wire.settings import Settings
from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.common.option_names import in_python, named_as

DESCRIPTION = """Fit training into the memory you have: profiles in, plans out, with a proven gap.

Long work answers 202 with a job; its events are at `/v1/jobs/{id}/events`. A repeated request is the same job. A budget that is too
small is a result (`status: infeasible`, with the smallest budget that is enough), not an error. Every error has one form.

**Who asks.** Whoever has the token is one user: jobs, idempotency keys and the queue are shared. Without a token there is one user, at
this machine.

**In time.** A request's headers must come within 10 s and its body within 60 s, else the answer is 408. A body has at most 256 KiB,
an uploaded profile 64 MiB unpacked, with at most 250,000 operators and 1,000,000 tensors in all of its layers, else the answer is 413
or 422. Where too many connections are open, those that have waited for
their client for longest give way to new ones."""
CODES: dict[int, Code] = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
WAITING_CONNECTIONS = 1024
"""that the kernel holds for us"""
ACCEPTED_AT_ONCE = 32
"""connections that are accepted before what the latest have sent is read: few, or they would look as if they had sent nothing"""
ROUTERS = tuple(
    routes.router for routes in (routes_profiles, routes_planning, routes_fleets, routes_runs, routes_jobs, routes_page)
)
log = logging.getLogger("tightfit.service")


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes work with (``request.app.state.service``)."""

    settings: Settings
    store: Store
    objects: Objects
    events: Events
    metrics: Metrics
    redaction: Redaction
    supervisor: Supervisor
    uploads: Uploads


@contextlib.contextmanager
def opened(settings: Settings, metrics: Metrics) -> Iterator[Service]:
    """The data folder, open for this service alone, with what was left unfinished there put back into the queue.

    Raises InputError where another service has it, or where it cannot be read, and StorageError where its disk is full.
    """
    redaction = Redaction(settings.folders)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock(settings.data_dir))
        store = Store(settings.data_dir / "service.sqlite")
        stack.callback(store.close)
        objects = Objects(settings.data_dir / "objects")
        events = Events(redaction.job)
        supervisor = Supervisor(settings, store, objects, events, metrics)
        uploads = Uploads(settings, store, objects, metrics, supervisor.processes)
        supervisor.recover()
        metrics.watch(lambda: _gauges(store, events))
        yield Service(
            settings=settings,
            store=store,
            objects=objects,
            events=events,
            metrics=metrics,
            redaction=redaction,
            supervisor=supervisor,
            uploads=uploads,
        )


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """The application, over a `service` that is open, or over that of `settings`, which is opened when it starts."""
    metrics = Metrics() if service is None else service.metrics

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        with opened(settings, metrics) if service is None else contextlib.nullcontext(service) as found:
            app.state.service = found
            await found.supervisor.start()
            try:
                yield
            finally:
                await found.supervisor.stop()

    app = FastAPI(
        title="tightfit",
        version=installed_version(),
        description=DESCRIPTION,
        lifespan=life,
        docs_url=None,  # its page would come from elsewhere
        redoc_url=None,
        responses=EVERYWHERE,
    )
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(UnreadableError, _unreadable_error)
    app.add_exception_handler(TightfitError, _library_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    for router in ROUTERS:
        app.include_router(router)
    undescribed = app.openapi
    app.openapi = lambda: _with_token(undescribed())  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _with_token(described: dict[str, Any]) -> dict[str, Any]:
    """The API's description, with the token that a service may ask for."""
    told = "needed where the service was started with TIGHTFIT_TOKEN"
    scheme = {"type": "http", "scheme": "bearer", "description": told}
    described["components"]["securitySchemes"] = {"token": scheme}
    for path, methods in described["paths"].items():
        for operation in methods.values():
            operation["security"] = [{}] if path.startswith(OPEN) else [{"token": []}, {}]
    return described


def serve(settings: Settings) -> None:
    """Answer until interrupted. Errors name options as requests do.

    Raises InputError where the data folder or the port cannot be had, and StorageError where the folder's disk is full.
    """
    from tightfit.planner.service.http.logs import log_to_stderr

    log_to_stderr()
    with opened(settings, Metrics()) as service, named_as(in_python):
        _answer(settings, service)


def _answer(settings: Settings, service: Service) -> None:
    """Bind the port and answer there until interrupted. Raises InputError where the port cannot be had."""
    import signal
    import socket

    import uvicorn

    from tightfit.planner.service.http.connections import Connections, most_connections, protocol_of

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio turns off Nagle's algorithm: else every answer waits 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host.strip("[]"), settings.port))
        listening.listen(WAITING_CONNECTIONS)  # who comes before the application is up waits, instead of being refused
    except OSError as error:
        raise InputError(
            f"--host {settings.host} --port {settings.port}: {error.strerror or error}; name another --port"
        ) from error
    host, port = listening.getsockname()[:2]
    log.info(
        "serving",
        extra={"url": f"http://{f'[{host}]' if ':' in host else host}:{port}/", "data": str(settings.data_dir)},
    )
    app = create_app(settings, service)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.events.close()  # else it would wait for streams that wait for jobs
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listening.listen(WAITING_CONNECTIONS)  # uvicorn has just made it as many as are accepted at once

    config = uvicorn.Config(
        app,
        http=protocol_of(Connections(most_connections())),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        backlog=ACCEPTED_AT_ONCE,
        proxy_headers=False,  # else who asks could call itself by any address
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn ends on them, and raises them once more at the end
    Server(config).run(sockets=[listening])


def installed_version() -> str:
    try:
        return version("tightfit")
    except PackageNotFoundError:
        return "0+checkout"


def _lock(folder: Path) -> IO[bytes]:
    """The data folder, for us alone while the file is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (folder / "lock").open("wb")
    except OSError as error:
        raise InputError(f"--data-dir {folder}: {error.strerror}; name a folder that can be written") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(f"--data-dir {folder}: another service is using it; end it, or name another folder") from error
    return file


def _gauges(store: Store, events: Events) -> Iterator[tuple[str, str, tuple[str, ...], dict[tuple[str, ...], float]]]:
    jobs: dict[tuple[str, ...], float] = {place: float(count) for place, count in store.counts().items()}
    yield "tightfit_jobs_now", "Jobs in the store.", ("kind", "state"), jobs
    yield (
        "tightfit_stored_bytes",
        "Bytes of stored profiles, plans, results and packed weights.",
        (),
        {(): float(store.stored_bytes())},
    )
    yield "tightfit_listeners", "Open event streams.", (), {(): float(events.listeners)}


# --- errors: one form -------------------------------------------------------------------------------------------------


def error_response(status: int, code: Code, message: str, fields: list[FieldError] | None = None) -> Response:
    import json

    answer = ErrorAnswer(error=Error.model_construct(code=code, message=message, fields=fields or []))
    # ASCII: what was sent may hold what cannot be encoded.
    body = json.dumps(answer.model_dump(warnings=False), ensure_ascii=True)
    headers = {"Retry-After": "30"} if status == 429 else None
    return Response(body, status_code=status, media_type="application/json", headers=headers)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    fields = [FieldError.model_construct(field=error.field, message=str(error))] if error.field else []
    return error_response(error.status, error.code, str(error), fields)


async def _unreadable_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UnreadableError)
    return await _service_error(request, request.app.state.service.store.damaged(error.digest, str(error)))


async def _library_error(request: Request, error: Exception) -> Response:
    told = request.app.state.service.redaction.text(str(error))
    if isinstance(error, RunError):  # nothing was wrong with the request
        log.error("not stored", extra={"why": str(error)})
        return error_response(507, "storage", told)
    return error_response(422, "invalid_request", told, [FieldError(field="body", message=told)])


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found: list[dict[str, Any]] = list(error.errors())
    fields = [
        FieldError.model_construct(
            field=".".join(str(part) for part in one["loc"]),
            message=f"not JSON ({one['ctx']['error']})" if one["type"] == "json_invalid" else one["msg"],
        )
        for one in found[:20]
    ]
    malformed = any(one["type"] == "json_invalid" for one in found)
    message = "; ".join(f"{one.field}: {one.message}" for one in fields[:3])
    return error_response(400 if malformed else 422, "invalid_request", message, fields)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404:
        told = f"there is nothing at {request.url.path}; /openapi.json tells what there is"
    elif error.status_code == 405:
        methods = _methods(request, headers.get("Allow", ""))
        told = f"{request.method} is not for {request.url.path}; send {' or '.join(methods)}"
        headers["Allow"] = ", ".join(methods)
    answer = error_response(error.status_code, CODES.get(error.status_code, "invalid_request"), told)
    answer.headers.update(headers)
    return answer


def _methods(request: Request, first: str) -> list[str]:
    """What may be sent to the path of a request, by all of its routes: Starlette tells the `first` one's alone."""
    found = [
        route for router in ROUTERS for route in router.routes if route.matches(request.scope)[0] is not Match.NONE
    ]
    return sorted(
        {
            *filter(None, first.split(", ")),
            *(method for route in found for method in getattr(route, "methods", None) or ()),
        }
    )


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(500, "internal", "internal error; the service's log tells more")
