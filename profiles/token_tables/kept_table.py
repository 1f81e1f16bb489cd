"""The table of a tokenizer in the cache, made once for each content of a tokenizer's file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tightfit.profiles.token_tables.table_file import NoTableError, TableParts, write_table
from tightfit.profiles.token_tables.tokenizer_table import WHOLE_WORDS, TokenizerTable, library_pipeline
from tightfit.runtime.common.errors import CapError, InputError, RunError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.interpreter import command, python_path
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.supervision.spare_memory import free_memory

SMALL_BYTES = 8 * MIB
"""A vocabulary that takes less is read in this process."""
PROCESS_BYTES = 32 * MIB
"""of a process that makes tables, without the vocabulary"""
NO_TABLE = 3
"""exit status of a process that cannot make a table of a tokenizer"""
Parts = Callable[[Path], TableParts]


def making_bytes(data_bytes: int) -> int:
    """Most bytes of the process that makes a table of a vocabulary that takes `data_bytes` meanwhile."""
    return PROCESS_BYTES + data_bytes


def kept_table(file: Path, digest: str, parts: Parts, module: str, data_bytes: int) -> TokenizerTable | None:
    """The table of the tokenizer in `file`, whose content has the `digest`; None if a table cannot be made of it.

    `parts` reads the file, and `module` does so as a program of its own, with `write_kept_table`: a large vocabulary takes more
    memory while its table is made, `data_bytes`, than the process ought to have that uses it. Raises CapError where there is not
    so much memory, and RunError if the disk is full.
    """
    path = cache_directory() / "tokenizers" / f"{digest}.table"
    with suppress(OSError, InputError):
        return TokenizerTable(path)
    if data_bytes < SMALL_BYTES:
        try:
            _write(path, parts(file))
        except (NoTableError, OSError):
            return None
    else:
        left, source = free_memory()
        if making_bytes(data_bytes) > left:
            raise CapError(
                f"{file}: its tokenizer's table takes about {format_size(making_bytes(data_bytes))} while it is made, and {source}; free"
                f" some, or copy {path} from a machine where the model was used before"
            )
        if not _written_apart(command(module, str(file), str(path))):
            return None
    return TokenizerTable(path)


def _write(path: Path, parts: TableParts) -> None:
    """Write a table, of what the library takes."""
    library_pipeline(parts.pipeline, WHOLE_WORDS)
    write_table(path, parts)


def _written_apart(words: list[str]) -> bool:
    """Whether a process of its own has made the table. Raises RunError if that failed."""
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": python_path()}, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, NO_TABLE):
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RunError(f"the tokenizer's table was not made ({reason[0]}); free some memory or disk and start again")
    return not done.returncode


def write_kept_table(parts: Parts) -> None:
    """Write the table of a file, both named on the command line: for the process of its own."""
    file, path = map(Path, sys.argv[1:])
    try:
        _write(path, parts(file))
    except (NoTableError, OSError):
        sys.exit(NO_TABLE)
    except (InputError, RunError) as error:
        sys.exit(str(error))
