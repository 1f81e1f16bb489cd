"""The output folder of a run: finds its checkpoints, and turns failures to write there into messages with advice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.option_names import spelled


def find_checkpoints(directory: str) -> list[tuple[int, str]]:
    """(step, path) of all complete checkpoints, oldest first."""
    if not os.path.isdir(directory):
        return []
    matches = ((NAME.fullmatch(name), name) for name in os.listdir(directory))
    return sorted((int(match[1]), os.path.join(directory, name)) for match, name in matches if match)


def how_to_continue(directory: str) -> str:
    """Advice after a failure: resume if there is a checkpoint, else start again."""
    return (
        f"continue with {spelled('resume', True)}"
        if find_checkpoints(directory)
        else f"start again with {spelled('overwrite', True)}"
    )


@contextmanager
def writing_to(directory: str | os.PathLike[str]) -> Iterator[None]:
    """While entered, an OSError becomes a RunError about writing to `directory`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"writing to {directory} failed: {error.strerror}; free disk space and"
            f" {how_to_continue(os.fspath(directory))}"
        ) from error


NAME = re.compile(r"checkpoint-(\d+)")
