"""C compiled on this machine, where there is a compiler: built once into the cache, used for what a fresh process finds right.

Also imported by the budgeted process: the standard library only, and what building needs where it is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tightfit.runtime.common.interpreter import command, python_path


def library(source: Path, flags: Sequence[str], cache: Path, judge: str, environment: dict[str, str]) -> str:
    """Path of the judged library of `source` in `cache`, built now if need be; empty where it cannot be built or serves nothing.

    The module `judge`, run with the library's path in `environment` and ours, prints as a JSON list what the library serves for.
    """
    import shutil
    import subprocess
    import tempfile

    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return ""
    path = folder(cache) / f"{source.stem}-{_key(source, flags, compiler)}.so"
    judged = Path(verdict(str(path)))
    if not judged.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                built = Path(scratch) / path.name
                compiling = [compiler, *flags, "-shared", "-fPIC", "-o", str(built), str(source)]
                subprocess.run(compiling, check=True, capture_output=True, timeout=120)
                found = Path(verdict(str(built)))
                found.write_text(json.dumps(_judged(built, judge, environment)))
                built.replace(path)
                found.replace(judged)
        except (OSError, ValueError, subprocess.SubprocessError):
            return ""  # no OpenMP, a read-only cache, a compiler that hangs: the work is done without
    return str(path) if chosen(str(path)) else ""


def folder(cache: Path) -> Path:
    """Where libraries are."""
    return cache / "native"


def chosen(path: str) -> list[str]:
    """What the library at `path` serves for. Raises OSError where it is gone."""
    with open(verdict(path), "rb") as file:
        found: list[str] = json.load(file)
    return found


def verdict(path: str) -> str:
    """Where it is written what a library serves for."""
    return f"{path}.json"


def _key(source: Path, flags: Sequence[str], compiler: str) -> str:
    """sha256 of the source, the flags, the compiler and the processor's features."""
    import hashlib

    from tightfit.runtime.common.processor import features

    stamp = Path(compiler).stat()
    parts = [source.read_text(), *flags, compiler, str(stamp.st_mtime_ns), *sorted(features())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _judged(path: Path, judge: str, environment: dict[str, str]) -> list[str]:
    """What a fresh process makes of the library: one that crashes takes nothing with it."""
    import subprocess

    done = subprocess.run(
        command(judge, str(path)),
        check=True,
        capture_output=True,
        timeout=120,
        text=True,
        env={**os.environ, **environment, "PYTHONPATH": python_path()},
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]
