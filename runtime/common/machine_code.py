"""Compiles C code on this machine, once, into the cache, and has a fresh process test which functions of the library
work.

Also imported by the budgeted process: the standard library only, and what building needs where it is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tightfit.runtime.common.interpreter import command


def library(source: Path, flags: Sequence[str], cache: Path, judge: str, environment: dict[str, str]) -> str:
    """Path of the library of `source` in `cache`, built and tested now if need be.

    Empty if there is no compiler, it cannot be built, or none of its functions works. The module `judge` is the
    test: run with the library's path as its argument and `environment` added to ours, it prints a JSON list of what
    works.
    """
    import shutil
    import subprocess
    import tempfile

    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return ""
    path = folder(cache) / f"{source.stem}-{_key(source, flags, compiler)}.so"
    verdict_path = Path(verdict(str(path)))
    if not verdict_path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                built = Path(scratch) / path.name
                command_line = [compiler, *flags, "-shared", "-fPIC", "-o", str(built), str(source)]
                subprocess.run(command_line, check=True, capture_output=True, timeout=120)
                built_verdict = Path(verdict(str(built)))
                built_verdict.write_text(json.dumps(_test_results(built, judge, environment)))
                built.replace(path)
                built_verdict.replace(verdict_path)
        except (OSError, ValueError, subprocess.SubprocessError):
            return ""  # e.g. no OpenMP, a read-only cache, a compiler that hangs: callers do without the library
    return str(path) if working_functions(str(path)) else ""


def folder(cache: Path) -> Path:
    """Folder of the compiled libraries in `cache`."""
    return cache / "native"


def working_functions(path: str) -> list[str]:
    """The functions of the library at `path` that work, as its test found. Raises OSError if the test's result is
    gone.
    """
    with open(verdict(path), "rb") as file:
        working: list[str] = json.load(file)
    return working


def functions(path: str, prefix: str, arguments: Sequence[Any], among: Collection[str] | None = None) -> dict[str, Any]:
    """Those functions of the library at `path` that work, by their names without `prefix`, and of these only the ones
    `among` some if that is given; none if `path` is empty or the file is gone. Each takes `arguments`, types of ctypes,
    and returns nothing.
    """
    if not path:
        return {}
    try:
        good = [name for name in working_functions(path) if among is None or name in among]
        return load_functions(path, prefix, good, arguments)
    except (OSError, ValueError, AttributeError):
        return {}  # the cache was cleaned meanwhile


def load_functions(path: str, prefix: str, names: Sequence[str], arguments: Sequence[Any]) -> dict[str, Any]:
    """The functions of the library at `path` whose names without `prefix` are `names`, whether they work or not."""
    import ctypes

    library = ctypes.CDLL(path)
    functions = {name: getattr(library, prefix + name) for name in names}
    for function in functions.values():
        function.argtypes, function.restype = tuple(arguments), None
    return functions


def verdict(path: str) -> str:
    """Path of the file with the result of a library's test."""
    return f"{path}.json"


def _key(source: Path, flags: Sequence[str], compiler: str) -> str:
    """Beginning of a sha256 of the source, the flags, the compiler and the processor's features."""
    import hashlib

    from tightfit.runtime.common.processor import features

    stamp = Path(compiler).stat()
    parts = [source.read_text(), *flags, compiler, str(stamp.st_mtime_ns), *sorted(features())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _test_results(path: Path, judge: str, environment: dict[str, str]) -> list[str]:
    """Run the test `judge` in a process of its own, because the library may crash it; returns the list that it
    prints.
    """
    import subprocess

    from tightfit.runtime.common.children import own_environment

    process = subprocess.run(
        command(judge, str(path)),
        check=True,
        capture_output=True,
        timeout=120,
        text=True,
        env=own_environment(**environment),
    )
    return json.loads(process.stdout)  # type: ignore[no-any-return]
