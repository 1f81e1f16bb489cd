"""The channel between memory and disk: one thread that carries out transfers in order, beside the computation."""

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
"""of a core, for which the thread asks at a time: the least that Linux grants"""
SWITCH_SECONDS = 2e-4
"""after which a thread that waits for Python's lock asks for it; Python's own figure is 5 ms"""
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""number of the system call by machine; glibc has had a function of this name since 2.41 only"""


class Channel:
    """First in, first out. A ticket is a number that grows; when it is done, all before it are done too.

    An error in a transfer is raised by the next `wait`, in the thread that waits; transfers after it are not started. For
    requests of one thread; until `close` the process's threads hand Python's lock on sooner (`SWITCH_SECONDS`).
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[int, threading.Lock | None, Transfer, tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._answers: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._served = 0
        """The last ticket that the thread is through with."""
        self._issued = 0
        self._done = 0
        self._failure: BaseException | None = None
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))
        self._thread = threading.Thread(target=self._serve, name="tightfit-io", daemon=True)
        self._thread.start()

    def submit(self, transfer: Transfer, *arguments: Any) -> int:
        """Queue ``transfer(*arguments)``; returns its ticket, where the channel was idle once its thread has taken it up.

        A thread that is only told to begin may get neither a core nor Python's lock until the operators beside it are
        through, which may be those that need what it brings: at times every fourth read began 2 ms after its request, where
        0.05 ms are usual (two Zen 5 cores).
        """
        taken_up = None
        if self._served == self._issued:
            taken_up = threading.Lock()
            taken_up.acquire()
        self._issued += 1
        self._requests.put((self._issued, taken_up, transfer, arguments))
        if taken_up is not None:
            taken_up.acquire()
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
        sys.setswitchinterval(self._switch_seconds)

    def _serve(self) -> None:
        _ask_for_short_slices()
        failed = False
        while (request := self._requests.get()) is not None:
            ticket, taken_up, transfer, arguments = request
            if taken_up is not None:
                taken_up.release()
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
    """Go before threads that compute for longer at a time (Linux 6.12; a request that needs no privilege, and is all that it is).

    Of reads of 2 MiB beside products on two Zen 5 cores, 1.3 ms each by the median, one in twenty took 1.44 to 3.5 ms with Python's
    and Linux's own figures, and 1.35 to 1.46 with these two; the products lost 0.25 ms to a read, and 0.19.
    """
    number = SCHED_SETATTR.get(os.uname().machine) if sys.platform == "linux" else None
    with contextlib.suppress(OSError):
        if number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
            nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            # size, policy, flags, nice, priority, slice, deadline, period; older kernels do not look at the slice
            attributes = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE_NANOSECONDS, 0, 0)
            ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, ctypes.c_char_p(attributes), 0)
