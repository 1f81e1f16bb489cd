"""Confines the paths that requests name to the folders that whoever started the service has opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tightfit.planner.service.wire.errors import invalid

MOST_ENTRIES = 100_000
"""files and folders of a folder that a request may name, all those below it counted"""


def confined(text: str, roots: Sequence[Path], field: str) -> str:
    """The real path of `text`, absolute or relative to a root.

    Raises ServiceError 422 for what lies outside, links followed, and for a folder that holds a link to what lies
    outside.
    """
    if not roots:
        raise invalid(field, f"{text!r}: no folder is open to requests; start the service with --root FOLDER")
    tops = [root.resolve() for root in roots]
    for top in tops:
        try:
            real = (top / text).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            continue
        if _within(real, [top]):
            if real.is_dir():
                _check_links(real, tops, text, field)
            return str(real)
    raise invalid(field, f"{text!r} is no file or folder under a folder that is open to requests")


def _within(real: Path, tops: Sequence[Path]) -> bool:
    return any(real == top or top in real.parents for top in tops)


def _check_links(folder: Path, tops: Sequence[Path], text: str, field: str) -> None:
    """Raises ServiceError where a link in `folder`, or in a folder that it leads to, leads out of all of `tops`.

    Links between files that are open are fine: the Hugging Face cache is made of them.
    """
    checked, folders, entries = {folder}, [folder], 0
    while folders:
        for entry in _entries(folders.pop()):
            entries += 1
            if entries > MOST_ENTRIES:
                raise invalid(
                    field, f"{text!r} holds more than {MOST_ENTRIES} files; name the folder of the model or data itself"
                )
            real = _target(Path(entry.path)) if entry.is_symlink() else Path(entry.path)
            if real is None:
                continue
            if not _within(real, tops):
                link = os.path.relpath(entry.path, folder)
                message = f"{text!r} holds the link {link!r}, which leads out of the folders that are open to requests"
                raise invalid(field, f"{message}; put the file itself there, or open its folder with --root")
            if real not in checked and real.is_dir():
                checked.add(real)
                folders.append(real)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # a run cannot read it either
        return []


def _target(link: Path) -> Path | None:
    """Where a link leads, whether anything is there or not; None for one that leads to itself."""
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        return None
