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
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.interpreter import command, python_path

NO_TABLE = 3
"""exit status of a process that cannot make a table of a tokenizer"""
Parts = Callable[[Path], TableParts]


def kept_table(file: Path, digest: str, parts: Parts, module: str, *, large: bool) -> TokenizerTable | None:
    """The table of the tokenizer in `file`, whose content has the `digest`; None if a table cannot be made of it.

    `parts` reads the file, and `module` does so as a program of its own, with `write_kept_table`: a `large` vocabulary takes more
    memory while its table is made than the process ought to have that uses it. Raises RunError if the disk is full.
    """
    path = cache_directory() / "tokenizers" / f"{digest}.table"
    with suppress(OSError, InputError):
        return TokenizerTable(path)
    if not large:
        try:
            _write(path, parts(file))
        except (NoTableError, OSError):
            return None
    elif not _written_apart(command(module, str(file), str(path))):
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
