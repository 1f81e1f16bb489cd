"""The channel between memory and disk: one thread that carries out transfers in order, beside the computation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

Transfer = Callable[..., None]


class Channel:
    """First in, first out. A ticket is a number that grows; when it is done, all before it are done too.

    An error in a transfer is raised by the next `wait`, in the thread that waits; transfers after it are not started.
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[int, Transfer, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._issued = 0
        self._done = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="tightfit-io", daemon=True)
        self._thread.start()

    def submit(self, transfer: Transfer, *arguments: Any) -> int:
        """Queue ``transfer(*arguments)``; returns its ticket."""
        self._issued += 1
        self._requests.put((self._issued, transfer, arguments))
        return self._issued

    def wait(self, ticket: int) -> None:
        """Return once `ticket` is done. Raises what the transfer, or one before it, raised."""
        while self._done < ticket:
            if self._failure is not None:
                raise self._failure
            answer = self._answers.get()
            if isinstance(answer, BaseException):
                self._failure = answer
            else:
                self._done = answer

    def drain(self) -> None:
        """Wait for everything."""
        self.wait(self._issued)

    def close(self) -> None:
        """Finish what is queued and end the thread; errors are dropped."""
        self._requests.put(None)
        self._thread.join()

    def _serve(self) -> None:
        failed = False
        while (request := self._requests.get()) is not None:
            ticket, transfer, arguments = request
            if failed:
                continue
            try:
                transfer(*arguments)
            except BaseException as error:  # raised again in `wait`
                failed = True
                self._answers.put(error)
            else:
                self._answers.put(ticket)
            del request, transfer, arguments
