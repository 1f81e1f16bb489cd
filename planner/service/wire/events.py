"""Live events of jobs: the latest progress of each running job, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from tightfit.planner.service.wire.schema import FINISHED, ServiceJob
from tightfit.planner.service.wire.settings import HEARTBEAT_SECONDS

QUEUE = 256
"""events that a slow listener may be behind before it loses the oldest"""


class Events:
    def __init__(self, redacted: Callable[[ServiceJob], ServiceJob] = lambda job: job) -> None:
        """`redacted` takes out of a job what clients are not to see."""
        self._redacted = redacted
        self._progress: dict[str, dict[str, Any]] = {}
        self._listeners: dict[str, set[asyncio.Queue[tuple[str, str]]]] = {}

    def close(self) -> None:
        """End every stream: the service is about to stop."""
        for job in self._listeners:
            self._send(job, "end", "")

    @property
    def listeners(self) -> int:
        return sum(map(len, self._listeners.values()))

    def progress(self, job: str, figures: dict[str, Any]) -> None:
        self._progress[job] = figures
        self._send(job, "progress", json.dumps(figures))

    def changed(self, job: ServiceJob) -> None:
        """Announce that the job's state has changed."""
        if job.state != "running":
            self._progress.pop(job.id, None)
        self._send(job.id, "job", self._redacted(job).model_dump_json())

    def shown(self, job: ServiceJob) -> ServiceJob:
        """The job as clients see it, with its latest progress."""
        return self._redacted(job).model_copy(update={"progress": self._progress.get(job.id)})

    def _send(self, job: str, name: str, data: str) -> None:
        for queue in self._listeners.get(job, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait((name, data))

    async def stream(self, identity: str, read: Callable[[str], ServiceJob]) -> AsyncIterator[str]:
        """Server-sent events: the job as it is, its progress, and the job again whenever its state changes, to its end.

        The job is `read` once the stream is among the listeners, so that no change of its state is missed.
        """
        queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue(QUEUE)
        self._listeners.setdefault(identity, set()).add(queue)
        try:
            job = read(identity)
            yield f"event: job\ndata: {self.shown(job).model_dump_json()}\n\n"
            finished = job.state in FINISHED
            while not finished:
                try:
                    name, data = await asyncio.wait_for(queue.get(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield ": still there\n\n"
                    continue
                if name == "end":
                    return
                yield f"event: {name}\ndata: {data}\n\n"
                finished = name == "job" and json.loads(data)["state"] in FINISHED
        finally:
            self._listeners[identity].discard(queue)
            if not self._listeners[identity]:
                del self._listeners[identity]
