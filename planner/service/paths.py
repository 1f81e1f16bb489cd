"""Paths that requests name: only what lies under a folder that whoever started the service has opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planner.service.errors import invalid


def confined(text: str, roots: Sequence[Path], field: str) -> str:
    """The real path of `text`, absolute or relative to a root. Raises ServiceError 422 for anything outside, links followed."""
    if not roots:
        raise invalid(field, f"{text!r}: no folder is open to requests; start the service with --root FOLDER")
    for root in roots:
        top = root.resolve()
        try:
            real = (top / text).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            continue
        if real == top or top in real.parents:
            return str(real)
    raise invalid(field, f"{text!r} is no file or folder under a folder that is open to requests")
