"""Ctrl-C beside solvers written in C++: seen at once, not when they come back to Python."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

Answer = TypeVar("Answer")
THREAD = "solver beside Ctrl-C"
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def interruptible(
    solve: Callable[[], Answer], stop: Callable[[], None] | None = None, seconds: float | None = None
) -> Answer:
    """What `solve` returns or raises. It works in a thread, because only Python code of the main thread sees signals.

    Raises KeyboardInterrupt at once, and TimeoutError after `seconds`: solvers look at their clock now and then only, and on a busy machine
    that may be many seconds apart. `stop` ends what `solve` does; without it, that goes on to its own time limit, and what it comes to is
    dropped; a process that ends waits for it, unless it ends by `os._exit`.
    """
    if threading.current_thread() is not threading.main_thread():
        return solve()
    answer: Future[Answer] = Future()

    def work() -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(solve())
        except BaseException as error:
            answer.set_exception(error)

    try:
        return answer.result(seconds) if _begun(work) else solve()
    except (KeyboardInterrupt, TimeoutError):
        if answer.done():
            raise  # it is `solve` that raised it
        # What has not begun never will.
        if not answer.cancel() and stop is not None:
            stop()
        raise


def _begun(work: Callable[[], None]) -> bool:
    """Start a thread for it; False: there is no memory for one.

    A signal that the thread got would leave the one that waits for it asleep: it begins without those that end a program.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # which may raise once it has blocked them
        threading.Thread(target=work, name=THREAD).start()
    except RuntimeError:
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return True


def left_alone() -> bool:
    """Whether a solver goes on that Ctrl-C, or its time limit, ended the waiting for."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def uninterrupted(solve: Callable[[], Answer]) -> Answer:
    """What `solve`, which takes no time that anyone waits for, returns or raises; Ctrl-C meanwhile is seen after it.

    For C++ that makes an error of its own of a KeyboardInterrupt in Python code that it calls.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        return solve()
    seen: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append((number, frame)))
    try:
        return solve()
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            before(*seen[0])
