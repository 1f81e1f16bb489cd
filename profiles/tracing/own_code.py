"""Finds the lines of the user's own code that an error, function or traced operator comes from; silences PyTorch's
messages.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tightfit.runtime.common.interpreter import PACKAGE

_OTHERS = (str(Path(torch.__file__).parent), str(PACKAGE))
_RECORDED = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n\s+(?P<code>.+)')


def is_own_code(file: str) -> bool:
    """Whether a file is the user's: not PyTorch's, not tightfit's, and not generated at run time."""
    return not file.startswith(("<", *(f"{folder}/" for folder in _OTHERS)))


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Within this context PyTorch does not log or print graphs that it failed to trace; output of the user's code
    passes.
    """
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    loggers = [logger for logger in map(logging.getLogger, names) if not logger.disabled]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stderr(_WithoutExport(sys.stderr)):
            yield
    finally:
        for logger in loggers:
            logger.disabled = False


class _WithoutExport:
    """Wraps a stream and drops what torch.export writes to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if sys._getframe(1).f_globals.get("__name__") == "torch.export._trace":
            return len(text)
        return int(self._stream.write(text))


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an error's traceback that lie in the user's own code, outermost first."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if is_own_code(frame.filename)]


def own_traceback(error: BaseException) -> str:
    """The error's message and its `own_frames`, formatted over several lines as Python prints a traceback."""
    lines = traceback.StackSummary.from_list(own_frames(error)).format()
    last = traceback.format_exception_only(error)
    return "".join(["Traceback (most recent call last):\n", *lines, *last]).rstrip()


def line_of_error(error: BaseException) -> str | None:
    """``file:12 (`the code there`)`` of the innermost of `own_frames`; None if there is none."""
    frames = own_frames(error)
    return _line(frames[-1].filename, frames[-1].lineno or 0, frames[-1].line) if frames else None


def line_of_node(node: fx.Node) -> str | None:
    """Like `line_of_error`, for a node of a graph that torch.export traced."""
    matches = [match for match in _RECORDED.finditer(node.meta.get("stack_trace") or "") if is_own_code(match["file"])]
    return _line(matches[-1]["file"], int(matches[-1]["line"]), matches[-1]["code"]) if matches else None


def line_of_function(function: Callable[..., Any] | type) -> str:
    """``file:12`` where a function, a callable object or a class is defined."""
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, type) and not hasattr(function, "__code__") and not hasattr(function, "__func__"):
        function = type(function)
    try:
        return f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):
        return repr(function)


def _line(file: str, number: int, code: str | None) -> str:
    return f"{file}:{number}" + (f" (`{code.strip()}`)" if code else "")
