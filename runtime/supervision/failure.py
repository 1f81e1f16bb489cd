"""Reports an exception to the user: a sentence on stderr, JSON on stdout if asked for, and an exit code.

The standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.limits import memory_advice

INTERRUPTED = 4
"""exit code after an interruption by a signal"""


def failure_of(error: BaseException) -> dict[str, Any]:
    """An error in the form of --json: `kind`, `message`, `exit_code`, and `minimum_budget_bytes` if it has one."""
    expected = isinstance(error, (TightfitError, OSError, KeyboardInterrupt))
    if isinstance(error, TightfitError):
        message, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", INTERRUPTED
    elif isinstance(error, OSError):
        file_name = f"{error.filename}: " if error.filename else ""
        message, code = f"{file_name}{error.strerror or error}", 4
    else:
        message, code = f"internal error, {type(error).__name__}: {error}; run again with --debug for its traceback", 4
    if advice := memory_advice(f"{type(error).__name__}: {error}", unexpected=not expected):
        message = f"{message if expected else f'memory could not be had ({type(error).__name__})'}; {advice}"
    kind = "Abort" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    failure: dict[str, Any] = {"kind": kind, "message": message, "exit_code": code}
    minimum = getattr(error, "minimum_budget_bytes", None)
    if minimum is not None:
        failure["minimum_budget_bytes"] = minimum
    return failure


def fail(error: BaseException, *, as_json: bool, debug: bool = False) -> int:
    """Report an error and return its exit code; with `debug` also print its traceback, unless it is an expected one."""
    if debug and not isinstance(error, (TightfitError, KeyboardInterrupt)):
        import traceback

        traceback.print_exception(error)
    return print_failure(failure_of(error), as_json=as_json)


def print_failure(failure: dict[str, Any], *, as_json: bool) -> int:
    """Print a failure and return its exit code."""
    sys.stderr.write(f"tightfit: {failure['message']}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": failure}, ensure_ascii=False) + "\n")
    code: int = failure["exit_code"]
    return code


def last_message(log: str | os.PathLike[str]) -> str:
    """The message of the error with which a command ended that wrote its output to the file `log`, or else its last
    line.
    """
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = file.read().strip().splitlines()
    for line in reversed(lines):
        try:
            return str(json.loads(line)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            continue
    return lines[-1] if lines else "it said nothing"
