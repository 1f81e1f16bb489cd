"""Live events of jobs: the latest progress of each running job, and streams of server-sent events, which are taken up
again after the last event that a client has had.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tightfit.planner.service.wire.schema import FINISHED, ServiceJob
from tightfit.planner.service.wire.settings import HEARTBEAT_SECONDS

QUEUE = 256
"""events that a slow listener may be behind before it loses the oldest, and those of a job that are remembered"""
ENDED = 16
"""jobs that have ended whose events are remembered"""
NUMBER = re.compile("[0-9]{1,15}")


class Event(NamedTuple):
    number: int
    """counts the events of all jobs"""
    name: str
    data: str


@dataclass
class History:
    """The latest events of a job."""

    forgotten: int
    """number of the last event that may be missing here"""
    events: deque[Event] = field(default_factory=deque)
    ended: bool = False

    def add(self, event: Event) -> None:
        if len(self.events) == QUEUE:
            self.forgotten = self.events.popleft().number
        self.events.append(event)


class Events:
    def __init__(self, redacted: Callable[[ServiceJob], ServiceJob] = lambda job: job) -> None:
        """`redacted` takes out of a job what clients are not to see."""
        self._redacted = redacted
        self._progress: dict[str, dict[str, Any]] = {}
        self._listeners: dict[str, set[asyncio.Queue[Event]]] = {}
        self._histories: dict[str, History] = {}
        self._start = os.urandom(4).hex()
        self._number = 0

    def close(self) -> None:
        """End every stream: the service is about to stop."""
        for job in self._listeners:
            self._pass_on(job, Event(0, "end", ""))

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
        history = self._histories.pop(job.id)
        self._histories[job.id] = history  # the last to be forgotten
        history.ended = job.state in FINISHED
        ended = [name for name, history in self._histories.items() if history.ended]
        for name in ended[:-ENDED]:
            del self._histories[name]

    def forget(self, job: str) -> None:
        """A job is deleted."""
        self._histories.pop(job, None)

    def shown(self, job: ServiceJob) -> ServiceJob:
        """The job as clients see it, with its latest progress."""
        return self._redacted(job).model_copy(update={"progress": self._progress.get(job.id)})

    def _send(self, job: str, name: str, data: str) -> None:
        self._number += 1
        event = Event(self._number, name, data)
        self._history(job).add(event)
        self._pass_on(job, event)

    def _history(self, job: str) -> History:
        """What is remembered of a job's events: from the next one on, where nothing is so far."""
        return self._histories.setdefault(job, History(forgotten=self._number))

    def _pass_on(self, job: str, event: Event) -> None:
        for queue in self._listeners.get(job, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    def _since(self, job: str, last_id: str | None) -> list[Event] | None:
        """The events of a job after the one with that id; None where some of them may have been forgotten."""
        start, _, number = (last_id or "").partition("-")
        history = self._histories.get(job)
        if history is None or start != self._start or not NUMBER.fullmatch(number):
            return None
        if not history.forgotten <= int(number) <= self._number:
            return None
        return [event for event in history.events if event.number > int(number)]

    async def stream(
        self, identity: str, read: Callable[[str], ServiceJob], last_id: str | None = None
    ) -> AsyncIterator[str]:
        """Server-sent events: the job as it is, its progress, and the job again whenever its state changes, to its end.
        Where `last_id` is the id of an event after which none has been forgotten, those after it, without the job as it
        is.

        The job is `read` once the stream is among the listeners, so that no change of its state is missed.
        """
        queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE)
        self._listeners.setdefault(identity, set()).add(queue)
        try:
            job = read(identity)
            finished = job.state in FINISHED
            missed = self._since(identity, last_id)
            if missed is None:
                if not finished:
                    self._history(identity)  # so that it can be taken up after what comes now
                missed = [Event(self._number, "job", self.shown(job).model_dump_json())]
            for event in missed:
                yield self._text(event)
            while not finished:
                try:
                    event = await asyncio.wait_for(queue.get(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield ": still there\n\n"
                    continue
                if event.name == "end":
                    return
                yield self._text(event)
                finished = _ends(event)
        finally:
            self._listeners[identity].discard(queue)
            if not self._listeners[identity]:
                del self._listeners[identity]

    def _text(self, event: Event) -> str:
        return f"event: {event.name}\nid: {self._start}-{event.number}\ndata: {event.data}\n\n"


def _ends(event: Event) -> bool:
    """Whether a job's stream ends with the event."""
    return event.name == "job" and json.loads(event.data)["state"] in FINISHED
