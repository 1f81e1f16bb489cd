"""Computes a part of the work in a forked copy of this process, which sends each answer as soon as it has it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from types import TracebackType
from typing import Generic, Self, TypeVar

from tightfit.runtime.common.gc_pause import paused_collector
from tightfit.runtime.common.parent import end_with_parent

Answer = TypeVar("Answer")


def can_be_copied() -> bool:
    """Whether this process can be forked: on Linux, from the main thread, not in a daemonic process.

    Threads other than daemons must not exist: a lock that another thread holds at the fork is never released in the
    copy. Daemon threads are let pass, because they are those of displays and notebooks, which do no planning.
    """
    main = threading.main_thread()
    others = [thread for thread in threading.enumerate() if thread is not main]
    alone = threading.current_thread() is main and all(thread.daemon for thread in others)
    return sys.platform == "linux" and alone and not multiprocessing.current_process().daemon


class ForkedWorker(Generic[Answer]):
    """While entered, a forked copy of this process iterates over `answers()` and sends each; on exit it is killed.

    If the copy fails, the answers that it has sent are all there are; if it cannot be started, there are none. Its
    error is not reported: the caller computes the missing answers itself, and meets the same error.
    """

    def __init__(self, answers: Callable[[], Iterable[Answer]]) -> None:
        self._answers = answers
        self._process: ForkProcess | None = None
        self._receiver: Connection | None = None
        self._whole = True
        """False if an exception interrupted receiving in the middle of an answer; then no more can be received"""

    def __enter__(self) -> Self:
        # During the fork Ctrl-C is only noted, and raised again afterwards: raised within, it could be lost, leave a
        # lock held, or leave the copy running without an owner.
        signals: list[int] = []
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
        try:
            with contextlib.suppress(OSError):
                self._start()
            if callable(handler):
                signal.signal(signal.SIGINT, handler)
            if signals:
                signal.raise_signal(signal.SIGINT)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        with sender, warnings.catch_warnings():
            # Python 3.12 and newer warn of a fork in a process with threads.
            warnings.simplefilter("ignore", DeprecationWarning)
            process = context.Process(target=_send, args=(self._answers, sender, os.getpid()), daemon=True)
            process.start()
        self._process = process

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._receiver is not None:
            self._receiver.close()

    def arrived(self, patience: float | None = 0.0, *, until: float = float("inf")) -> Iterator[Answer]:
        """Yield the answers that have not been received yet, until none comes for `patience` seconds.

        With `patience` None, wait until the copy has ended. The iteration also ends at the first answer that was found
        after `until`, a time of `time.monotonic`.
        """
        with contextlib.suppress(EOFError, OSError):
            while self._receiver is not None and self._whole and self._receiver.poll(patience):
                self._whole = False
                with paused_collector():
                    sent_at, answer = self._receiver.recv()
                self._whole = True
                if sent_at > until:
                    return
                yield answer


def _send(answers: Callable[[], Iterable[Answer]], sender: Connection, parent: int) -> None:
    # Ctrl-C is left to the parent process; and when the parent ends, however it does, the kernel kills this copy.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(Exception), sender:
        end_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            # Sent by a thread: writing a large answer blocks until the other process reads the pipe.
            with ThreadPoolExecutor(1) as sending:
                for answer in answers():
                    sending.submit(sender.send, (time.monotonic(), answer))
