"""Makes Ctrl-C work at once while a solver written in C++ runs, not only when it returns to Python."""

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
    """Call `solve` in a thread of its own and return or raise what it does; only the main thread, in Python code, sees
    signals.

    Raises KeyboardInterrupt at once on Ctrl-C, and TimeoutError after `seconds`, since solvers look at their clock only
    now and then, which on a busy machine may be many seconds apart. Then `stop` is called to end `solve`; without it
    `solve` goes on to its own time limit and its result is dropped. A process that ends waits for that thread, unless
    it ends by `os._exit`. Called from another thread than the main one, this just calls `solve`.
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
        return answer.result(seconds) if _started(work) else solve()
    except (KeyboardInterrupt, TimeoutError):
        if answer.done():
            raise  # it is `solve` that raised it
        # If the thread has not begun yet, cancelling keeps it from calling `solve`; otherwise `solve` is stopped.
        if not answer.cancel() and stop is not None:
            stop()
        raise


def _started(work: Callable[[], None]) -> bool:
    """Start a thread for `work`; False: there is no memory for one.

    The thread starts with the signals that end a program blocked: if it received one, the main thread would go on
    sleeping.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # which may raise once it has blocked them
        threading.Thread(target=work, name=THREAD).start()
    except RuntimeError:
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return True


def left_alone() -> bool:
    """Whether an abandoned solver is still running: one that Ctrl-C or its time limit ended the waiting for."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def uninterrupted(solve: Callable[[], Answer]) -> Answer:
    """Call `solve`, which must be short, with Ctrl-C held back until it has returned or raised.

    For C++ code that calls back into Python and turns a KeyboardInterrupt there into an error of its own.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return solve()
    signals: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: signals.append((number, frame)))
    try:
        return solve()
    finally:
        signal.signal(signal.SIGINT, handler)
        if signals:
            handler(*signals[0])
