"""The channel between memory and disk: one thread that carries out transfers in order, beside the computation."""

from __future__ import annotations

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
SWITCH_SECONDS = 2e-4
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""number of the system call by machine; glibc has had a function of this name since 2.41 only"""


class Channel:
    """First in, first out. A ticket is a number that grows; when it is done, all before it are done too.

    An error in a transfer is raised by the next `wait`, in the thread that waits; transfers after it are not started.
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[int, bool, Transfer, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._started = threading.Lock()
        self._started.acquire()
        self._served = 0
        """The last ticket that the thread is through with."""
        self._issued = 0
        self._done = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="tightfit-io", daemon=True)
        self._thread.start()

    def submit(self, transfer: Transfer, *arguments: Any) -> int:
        """Queue ``transfer(*arguments)``; returns its ticket, of an idle channel once the transfer has begun.

        A thread that was only told to begin may get neither a core nor Python's lock until the operators beside it are
        through, which may be those that need what it brings (2 ms instead of 0.05 for every fourth read at times, on two Zen 5 cores).
        """
        idle = self._served == self._issued
        self._issued += 1
        self._requests.put((self._issued, idle, transfer, arguments))
        if idle:
            self._started.acquire()
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
        _start_promptly()
        failed = False
        while (request := self._requests.get()) is not None:
            ticket, idle, transfer, arguments = request
            if idle:
                self._started.release()
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


def _start_promptly() -> None:
    """Let this thread run when it can, not when the operators beside it leave it a core or Python's lock.

    A short slice goes before the longer ones of the threads that compute (Linux 6.12; a request, no privilege needed), and
    who waits for the lock asks for it sooner than after 5 ms. Beside products on two Zen 5 cores the slowest 5 % of reads of 2
    MiB took 1.35 to 1.46 ms with both and 1.44 to 3.5 without (median 1.3), and products lost 0.19 and 0.25 ms to one.
    """
    sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
    number = SCHED_SETATTR.get(os.uname().machine)
    if sys.platform == "linux" and number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        # size, policy, flags, nice, priority, slice, deadline, period; older kernels do not look at the slice
        attributes = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE_NANOSECONDS, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, ctypes.c_char_p(attributes), 0)
