"""Unpacking in compiled code where a C compiler is at hand: built once per machine, trusted only after it was compared.

`library` compiles ``unpack.c`` into the cache and lets a fresh process judge it: a format counts only if its results equal
PyTorch's bit for bit and come faster. Lean processes find the library through the environment variable `VARIABLE`
(`runtime.process.child_environment` sets it) and fall back to PyTorch for everything else.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiles.files import python_path
from profiles.processor import features

VARIABLE = "TIGHTFIT_NATIVE"
"""Path of the library; empty: do without."""
SOURCE = Path(__file__).with_name("unpack.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-shared", "-fPIC")
FORMATS = ("q4_bfloat16", "q8_bfloat16", "q8_float32")
Unpack = Callable[[int, int, int, int, int], None]
"""(address of packed groups, address of the output, groups, elements per group, bytes per group)"""


def functions(path: str | None = None) -> dict[str, Unpack]:
    """The unpacking functions by ``format_dtype`` that were found equal and faster; none where there is no library."""
    path = os.environ.get(VARIABLE, "") if path is None else path
    if not path:
        return {}
    try:
        return _load(path, _chosen(path))
    except (OSError, ValueError, AttributeError):
        return {}  # a cache that was cleaned meanwhile


def _chosen(path: str) -> list[str]:
    """The verdict on a library."""
    with open(f"{path}.json", "rb") as file:  # noqa: PTH123  pathlib costs the lean process memory
        found: list[str] = json.load(file)
    return found


def _load(path: str, names: list[str]) -> dict[str, Unpack]:
    found = ctypes.CDLL(path)
    made: dict[str, Unpack] = {}
    for name in names:
        function = getattr(found, f"tightfit_{name}")
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        function.restype = None
        made[name] = function
    return made


def library(cache: Path) -> str:
    """Path of the judged library in `cache`, built now if need be; empty where it cannot be built or nothing is gained."""
    if os.environ.get(VARIABLE) is not None:
        return os.environ[VARIABLE]
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return ""
    path = cache / "native" / f"unpack-{_key(compiler)}.so"
    verdict = Path(f"{path}.json")
    if not verdict.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / path.name
                command = [compiler, *FLAGS, "-o", str(built), str(SOURCE)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                judged = Path(f"{built}.json")
                judged.write_text(json.dumps(_judged(built)))
                built.replace(path)
                judged.replace(verdict)
        except (OSError, ValueError, subprocess.SubprocessError):
            return ""  # no OpenMP, a read-only cache, a compiler that hangs: PyTorch's own path does the work
    return str(path) if _chosen(str(path)) else ""


def _key(compiler: str) -> str:
    """sha256 of the source, the flags, the compiler and the processor's features."""
    stamp = Path(compiler).stat()
    parts = [SOURCE.read_text(), *FLAGS, compiler, str(stamp.st_mtime_ns), *sorted(features())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _judged(path: Path) -> list[str]:
    """What a fresh process makes of the library: one that crashes takes nothing with it."""
    command = [sys.executable, "-m", "profiles.native", str(path)]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        timeout=120,
        text=True,
        env={**os.environ, VARIABLE: "", "PYTHONPATH": python_path()},
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def judge(path: str) -> list[str]:
    """The formats for which the library equals PyTorch's results bit for bit and is faster."""
    import time

    import torch

    from profiles.layout import Entry
    from profiles.store import unpack

    def seconds(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return min(times)

    chosen = []
    for name, native in _load(path, list(FORMATS)).items():
        kind, dtype = name.split("_")
        generator = torch.Generator().manual_seed(0)
        equal, gained = True, False
        for shape, group in (((3, 36), 18), ((5, 64), 32), ((64, 96), 16), ((1536, 576), 32)):
            entry = Entry(name="w", shape=shape, format=kind, group=group)
            groups = entry.rows * entry.columns // group
            packed = torch.randint(0, 256, (groups, entry.bytes // groups), dtype=torch.uint8, generator=generator)
            # float16 numbers of every size, negative and subnormal ones too, but neither infinite nor NaN
            high = slice(1, 2) if kind == "q8" else slice(packed.shape[1] - 3, None, 2)
            packed[:, high] &= 0xBB
            out, expected = (torch.empty(shape, dtype=getattr(torch, dtype)) for _ in range(2))
            arguments = (packed.data_ptr(), out.data_ptr(), groups, group, packed.shape[1])
            native(*arguments)
            unpack(entry, packed.view(-1), expected)
            equal = equal and torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
            if groups * group > 1 << 19:
                gained = seconds(lambda: native(*arguments)) < seconds(lambda: unpack(entry, packed.view(-1), expected))  # noqa: B023  called here
        if equal and gained:
            chosen.append(name)
    return chosen


if __name__ == "__main__":
    sys.stdout.write(json.dumps(judge(sys.argv[1])))
