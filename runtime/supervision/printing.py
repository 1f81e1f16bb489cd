"""Prints a command's result on stdout: one JSON object, or text and tables for people."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tightfit.runtime.common.strict_json import to_json


def answer(result: dict[str, Any], human: Any, *, as_json: bool) -> None:
    """Print `result` as JSON, or else `human`, text or a table that rich prints; None prints nothing."""
    if as_json:
        sys.stdout.write(to_json(result) + "\n")
    elif human is not None:
        from rich.console import Console

        console = Console(highlight=False, emoji=False)
        if console.is_terminal or "COLUMNS" in os.environ:
            console.print(human)
            return
        # A file or a pipe has no width: do not wrap lines, and cut the spaces with which rich fills tables up.
        console.width = 1 << 16
        with console.capture() as captured:
            console.print(human)
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def with_stages(stages: str | None, report: dict[str, Any]) -> dict[str, Any]:
    """The answer of a run: its report, together with the answers of the stages before it if `stages` has them as
    JSON.
    """
    if stages is None:
        return report
    stages_done: dict[str, Any] = json.loads(stages)
    return stages_done | {"report": report}
