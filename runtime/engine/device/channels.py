"""The channel between memory and disk: a thread that carries out transfers in order while the main thread computes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

Transfer = Callable[..., None]
SLICE_NANOSECONDS = 100_000
"""time slice on a core that the thread asks the scheduler for; the shortest that Linux grants"""
SWITCH_SECONDS = 2e-4
"""time after which a thread that waits for the GIL makes its holder release it (`sys.setswitchinterval`); Python's
default is 5 ms"""
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""number of the system call by machine; glibc has had a function of this name since 2.41 only"""


class TransferChannel:
    """A first-in, first-out queue of transfers and the thread that carries them out.

    Each transfer has a ticket, and tickets count up: when one is done, so are all before it. If a transfer raises,
    later ones are not started, and the error is raised by the next `wait`. Only one thread may submit and wait. Until
    `close`, all threads of the process release the GIL sooner (`SWITCH_SECONDS`).
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[int, threading.Lock | None, Transfer, tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._answers: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._served = 0
        """The last ticket that the thread has finished or skipped."""
        self._issued = 0
        self._done = 0
        self._failure: BaseException | None = None
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))
        self._thread = threading.Thread(target=self._serve, name="tightfit-io", daemon=True)
        self._thread.start()

    def submit(self, transfer: Transfer, *arguments: Any) -> int:
        """Queue ``transfer(*arguments)`` and return its ticket.

        If the channel is idle, this first waits until its thread has taken the transfer up. Otherwise that thread might
        get neither a core nor the GIL until the operators that run beside it have finished, and the next operator may
        need what it reads: at times every fourth read began 2 ms after its request, where 0.05 ms are usual (two Zen 5
        cores).
        """
        started = None
        if self._served == self._issued:
            started = threading.Lock()
            started.acquire()
        self._issued += 1
        self._requests.put((self._issued, started, transfer, arguments))
        if started is not None:
            started.acquire()
        return self._issued

    def wait(self, ticket: int) -> None:
        """Wait until `ticket` is done. Raises what its transfer, or one before it, raised."""
        while self._done < ticket:
            if self._failure is not None:
                raise self._failure
            answer = self._answers.get()
            if isinstance(answer, BaseException):
                self._failure = answer
            else:
                self._done = answer

    def drain(self) -> None:
        """Wait until all submitted transfers are done. Raises what one of them raised."""
        self.wait(self._issued)

    def close(self) -> None:
        """Carry out the queued transfers and end the thread; errors are dropped."""
        self._requests.put(None)
        self._thread.join()
        sys.setswitchinterval(self._switch_seconds)

    def _serve(self) -> None:
        _ask_for_short_slices()
        failed = False
        while (request := self._requests.get()) is not None:
            ticket, started, transfer, arguments = request
            if started is not None:
                started.release()
            answer: int | BaseException | None = None
            if not failed:
                try:
                    transfer(*arguments)
                    answer = ticket
                except BaseException as error:  # raised again in `wait`
                    failed, answer = True, error
            self._served = ticket
            if answer is not None:
                self._answers.put(answer)
            del request, transfer, arguments, answer


def _ask_for_short_slices() -> None:
    """Ask the scheduler for short time slices, so that this thread runs before threads that compute for longer at a
    time.

    Needs Linux 6.12 and no privilege; elsewhere the request has no effect. Measured with reads of 2 MiB beside matrix
    products on two Zen 5 cores, 1.3 ms each by the median: with Python's and Linux's defaults one read in twenty took
    1.44 to 3.5 ms and a read cost the products 0.25 ms; with `SLICE_NANOSECONDS` and `SWITCH_SECONDS` it was 1.35 to
    1.46 ms and 0.19 ms.
    """
    number = SCHED_SETATTR.get(os.uname().machine) if sys.platform == "linux" else None
    with contextlib.suppress(OSError):
        if number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
            nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            # struct sched_attr: size, policy, flags, nice, priority, slice, deadline, period; older kernels ignore the
            # slice
            attributes = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE_NANOSECONDS, 0, 0)
            ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, ctypes.c_char_p(attributes), 0)
