"""What commands keep for later ones, in the cache folder: one small file for each thing that is known, under a name
made of all that it depends on. A file is whole or not there, one that cannot be read is removed, and of more than
`MOST_FILES` in a folder those go that were used longest ago.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.files import cache_directory, write_whole

T = TypeVar("T")
MOST_FILES = 256
"""in a folder: a profile of a large model takes 10 MB"""
LETTERS = 32
"""of the hash that is a file's name"""


def cache_place(folder: str, *parts: Any) -> Path:
    """Where that is kept which depends on `parts`, of which JSON is made."""
    return cache_directory() / folder / f"{cache_key(*parts)}.json"


def cache_key(*parts: Any) -> str:
    """A name made of `parts`."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:LETTERS]


def kept(place: Path, parse: Callable[[bytes], T]) -> T | None:
    """What `parse` makes of a file of the cache, which counts as used; None where there is none that can be read, or
    one that it refuses with ValueError or a TightfitError, which is removed.
    """
    try:
        content = parse(place.read_bytes())
    except OSError:
        return None
    except (ValueError, TightfitError):
        with suppress(OSError):
            place.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        place.touch()
    return content


def keep(place: Path, content: str | bytes) -> None:
    """Keep something at a place of the cache. Raises InputError or RunError where the cache cannot be written."""
    write_whole(place, content)
    with suppress(OSError):
        stored = sorted(place.parent.glob(f"*{place.suffix}"), key=lambda file: file.stat().st_mtime)
        for old in stored[:-MOST_FILES]:
            old.unlink(missing_ok=True)
