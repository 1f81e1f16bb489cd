"""The table of a tokenizer in the cache, made once for each content of a tokenizer's file."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tightfit.profiles.token_tables.table_file import NoTableError, TableParts, write_table
from tightfit.profiles.token_tables.tokenizer_table import WHOLE_WORDS, TokenizerTable, library_pipeline
from tightfit.profiles.worker_process import Progress, run_worker, work
from tightfit.runtime.common.errors import CapError, InputError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.interpreter import command, python_path
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.supervision.spare_memory import free_memory

SMALL_BYTES = 8 * MIB
"""A vocabulary that takes less is read in this process."""
PROCESS_BYTES = 32 * MIB
"""of a process that makes tables, without the vocabulary"""
Parts = Callable[[Path], TableParts]


def making_bytes(data_bytes: int) -> int:
    """Most bytes of the process that makes a table of a vocabulary that takes `data_bytes` meanwhile."""
    return PROCESS_BYTES + data_bytes


def kept_table(
    file: Path, digest: str, parts: Parts, module: str, data_bytes: Callable[[Path], int]
) -> TokenizerTable | None:
    """The table of the tokenizer in `file`, whose content has the `digest`; None if a table cannot be made of it.

    `parts` reads the file, and the worker `module` does so, with `write_kept_table`: a large vocabulary takes more
    memory while its table is made, `data_bytes` of the file, than the process ought to have that uses it. Raises CapError where there is not
    so much memory, and RunError if the disk is full.
    """
    path = cache_directory() / "tokenizers" / f"{digest}.table"
    with suppress(OSError, InputError):
        return TokenizerTable(path)
    try:
        needed_bytes = data_bytes(file)
    except OSError:
        return None
    if needed_bytes < SMALL_BYTES:
        try:
            _write(path, parts(file))
        except (NoTableError, OSError):
            return None
    else:
        left, source = free_memory()
        predicted_bytes = making_bytes(needed_bytes)
        copying = f"copy {path} from a machine where the model was used before"
        if predicted_bytes > left:
            raise CapError(
                f"{file}: its tokenizer's table takes about {format_size(predicted_bytes)} while it is made, and {source}; free some, or {copying}"
            )
        made = run_worker(
            command(module),
            {"file": str(file), "path": str(path)},
            os.environ | {"PYTHONPATH": python_path()},
            doing="making the tokenizer's table",
            predicted_bytes=predicted_bytes,
            instead=f"free some memory, or {copying}",
        )
        if not made:
            return None
    return TokenizerTable(path)


def _write(path: Path, parts: TableParts) -> None:
    """Write a table, of what the library takes."""
    library_pipeline(parts.pipeline, WHOLE_WORDS)
    write_table(path, parts)


def write_kept_table(parts: Parts) -> int:
    """The whole life of the worker that writes the table of a file; returns its exit code. Its result is whether there is a table."""

    def write(request: dict[str, Any], report: Progress) -> bool:
        try:
            _write(Path(request["path"]), parts(Path(request["file"])))
        except (NoTableError, OSError):
            return False
        return True

    return work(write)
