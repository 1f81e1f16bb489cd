"""A second process for a part of the work: a copy of this one as it is, which sends each answer as soon as it has it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Generic, Self, TypeVar

from planner.collector import paused_collector

Answer = TypeVar("Answer")
_DIES_WITH_PARENT = 1


def can_be_copied() -> bool:
    """Whether this process can: not where the kernel is another, nor from a thread beside others, which may hold a library's locks,
    nor where it is one that may have no children.
    """
    alone = threading.current_thread() is threading.main_thread()
    return sys.platform == "linux" and alone and not multiprocessing.current_process().daemon


class Beside(Generic[Answer]):
    """While entered, a copy of this process works out `answers`; then it is ended, whatever it has come to.

    A copy that fails ends with the answers it has sent. It says nothing of why: whoever needs the others works them out, and fails
    likewise.
    """

    def __init__(self, answers: Callable[[], Iterable[Answer]]) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, self._sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_send, args=(answers, self._sender, os.getpid()), daemon=True)

    def __enter__(self) -> Self:
        # Ctrl-C is for this process, which then ends the other.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with warnings.catch_warnings(), contextlib.suppress(OSError):
                # No process more, or no memory for one: then no answers come. From Python 3.12 on where a display has a thread of its own; the copy shows nothing.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
            self._sender.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
        self._receiver.close()

    def arrived(self, *, all_: bool = False) -> Iterator[Answer]:
        """Answers that have come since this was asked last; with `all_` those to come too, until the copy has ended."""
        with contextlib.suppress(EOFError, OSError):
            while all_ or self._receiver.poll():
                with paused_collector():
                    answer = self._receiver.recv()
                yield answer


def _send(answers: Callable[[], Iterable[Answer]], sender: Connection, parent: int) -> None:
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent:
        # In a thread: a pipe takes no large answer before the other process has time for it.
        with contextlib.suppress(Exception), ThreadPoolExecutor(1) as sending:
            for answer in answers():
                sending.submit(sender.send, answer)
