"""What is shown of plans: made by processes of their own, so that nobody else waits for it, and kept in memory while
there is room.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence

from fastapi import Request, Response

from tightfit.planner.service.jobs.orders import VIEW, JobOrder
from tightfit.planner.service.jobs.processes import WorkerProcesses, failure
from tightfit.planner.service.jobs.store import JobStore, Row
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.settings import Settings
from tightfit.runtime.common.units import format_size

MADE_AT_ONCE = 2
"""views that are made at once, so that a small one does not wait for a large one"""
MOST_KEPT_BYTES = 64 << 20
"""most bytes of views that are kept, packed"""


class Views:
    def __init__(self, settings: Settings, store: JobStore, objects: ObjectStore, processes: WorkerProcesses) -> None:
        self._settings, self._store, self._objects = settings, store, objects
        self._processes = processes
        self._makers = asyncio.Semaphore(MADE_AT_ONCE)
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._under_way: dict[str, asyncio.Task[bytes]] = {}

    def prepare(self) -> None:
        """Start a process that makes views, which takes a second: somebody is about to look."""
        self._processes.prepare(VIEW)

    async def answer(
        self, request: Request, what: str, rows: Sequence[Row], *, not_runnable: str | None = None
    ) -> Response:
        """What is shown of stored plans (`service.jobs.work.view.SHOWN`); `not_runnable` says why a plan cannot be run.

        Raises ServiceError for what is damaged, or takes too long or too much memory to show, and InputError for what
        is no plan.
        """
        content = await self._view(what, rows, not_runnable)
        headers = {"Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
        else:
            content = await asyncio.to_thread(gzip.decompress, content)
        return Response(content, media_type="application/json", headers=headers)

    async def _view(self, what: str, rows: Sequence[Row], not_runnable: str | None) -> bytes:
        """A view, packed: one that is kept, or is being made for somebody else, or a new one."""
        digests = {row["id"]: row["digest"] for row in rows}
        asked = {
            "what": what,
            "ids": [row["id"] for row in rows],
            "summary": json.loads(rows[0]["summary"]),
            "not_runnable": not_runnable,
        }
        key = hashlib.sha256(json.dumps([asked, digests]).encode()).hexdigest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._under_way:
            task = asyncio.create_task(self._make(asked, digests))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key))
        content = await asyncio.shield(self._under_way[key])
        self._keep(key, content)
        return content

    def _keep(self, key: str, content: bytes) -> None:
        self._kept[key] = content
        while len(self._kept) > 1 and sum(map(len, self._kept.values())) > MOST_KEPT_BYTES:
            self._kept.popitem(last=False)

    async def _make(self, asked: Row, digests: dict[str, str]) -> bytes:
        path = self._objects.temporary / f"view-{os.urandom(6).hex()}"
        order = JobOrder(
            kind=VIEW,
            request=asked | {"path": str(path)},
            objects=str(self._objects.folder),
            memory_bytes=self._settings.solve_bytes,
            digests=digests,
        )
        try:
            async with self._makers:
                end, last_stderr = await self._ask(order)
                if end is None:  # killed, perhaps while it waited
                    end, last_stderr = await self._ask(order)
            if end is None or "result" not in end:
                limit = format_size(self._settings.solve_bytes)
                message = f"what shows this takes more than {limit} of memory to make; download the file instead"
                too_much = ServiceError(422, "invalid_request", message)
                if end is not None and "unreadable" in end:
                    raise self._store.damaged(end["unreadable"], end["message"])
                raise failure("a view", end, last_stderr, too_much, self._objects.folder)
            return await asyncio.to_thread(path.read_bytes)
        except TimeoutError:
            message = (
                f"what shows this takes longer to make than {self._settings.check_seconds:g} s; download the file"
                " instead"
            )
            raise ServiceError(422, "invalid_request", message) from None
        finally:
            path.unlink(missing_ok=True)

    async def _ask(self, order: JobOrder) -> tuple[Row | None, str]:
        return await self._processes.ask(VIEW, order, self._settings.check_seconds)
