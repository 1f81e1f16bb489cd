"""A second process for a part of the work: a copy of this one as it is, which sends each answer as soon as it has it."""

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
    """Whether this process can: where the kernel is Linux, it may have children, and no other thread may be planning.

    What another thread holds at that moment nobody gives back in the copy. Displays and notebooks have threads that plan nothing: daemons.
    """
    main = threading.main_thread()
    others = [thread for thread in threading.enumerate() if thread is not main]
    alone = threading.current_thread() is main and all(thread.daemon for thread in others)
    return sys.platform == "linux" and alone and not multiprocessing.current_process().daemon


class ForkedWorker(Generic[Answer]):
    """While entered, a copy of this process works out `answers`; then it is ended, whatever it has come to.

    A copy that fails ends with the answers it has sent, and where there is no process or file more, none come. It says nothing
    of why: whoever needs the others works them out, and fails likewise.
    """

    def __init__(self, answers: Callable[[], Iterable[Answer]]) -> None:
        self._answers = answers
        self._process: ForkProcess | None = None
        self._receiver: Connection | None = None
        self._whole = True
        """whether nothing has stopped the receiver in the middle of an answer"""

    def __enter__(self) -> Self:
        # Ctrl-C is noted for now: raised at the fork it would be lost there, with a lock held, or leave the copy to itself.
        noted: list[int] = []
        before = signal.getsignal(signal.SIGINT)
        if callable(before):
            signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
        try:
            with contextlib.suppress(OSError):
                self._start()
            if callable(before):
                signal.signal(signal.SIGINT, before)
            if noted:
                signal.raise_signal(signal.SIGINT)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        with sender, warnings.catch_warnings():
            # From Python 3.12 on, where there are daemons.
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
        """Answers that have come since this was asked last, and those that come within `patience` seconds of the one before; None:
        until the copy has ended. Those found after `until`, on the monotonic clock, do not count: the first is the end.
        """
        with contextlib.suppress(EOFError, OSError):
            while self._receiver is not None and self._whole and self._receiver.poll(patience):
                self._whole = False
                with paused_collector():
                    found, answer = self._receiver.recv()
                self._whole = True
                if found > until:
                    return
                yield answer


def _send(answers: Callable[[], Iterable[Answer]], sender: Connection, parent: int) -> None:
    # Ctrl-C is for the process it was copied from, and whatever becomes of that, it does not outlive it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(Exception), sender:
        end_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            # In a thread: a pipe takes no large answer before the other process has time for it.
            with ThreadPoolExecutor(1) as sending:
                for answer in answers():
                    sending.submit(sender.send, (time.monotonic(), answer))
