"""Unpacks weights in compiled C (``unpack.c``) where there is a C compiler, for the formats in which that pays.

A format is used only if its results equal PyTorch's bit for bit and come faster. Lean processes find the library
through the environment variable `VARIABLE` (`tightfit.runtime.engine.start.process.child_environment` sets it) and
unpack all other formats with PyTorch.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tightfit.runtime.common import machine_code

VARIABLE = "TIGHTFIT_NATIVE"
"""Environment variable with the library's path; empty: unpack with PyTorch alone."""
SOURCE = Path(__file__).with_name("unpack.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off")
FORMATS = ("q4_bfloat16", "q8_bfloat16", "q8_float32")
Unpack = Callable[[int, int, int, int, int], None]
"""(address of packed groups, address of the output, groups, elements per group, bytes per group)"""


def functions(path: str | None = None) -> dict[str, Unpack]:
    """The unpacking functions that were found equal and faster, by ``format_dtype``; none if there is no library.

    `path` is the library; by default the one in the environment.
    """
    path = os.environ.get(VARIABLE, "") if path is None else path
    if not path:
        return {}
    try:
        return _load(path, machine_code.chosen(path))
    except (OSError, ValueError, AttributeError):
        return {}  # the cache was cleaned meanwhile


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
    """Path of the tested library in `cache`, built now if need be; empty if it cannot be built or no format is
    faster.
    """
    if os.environ.get(VARIABLE) is not None:
        return os.environ[VARIABLE]
    return machine_code.library(SOURCE, FLAGS, cache, "tightfit.runtime.engine.weights.native", {VARIABLE: ""})


def judge(path: str) -> list[str]:
    """The names in `FORMATS` for which the library equals PyTorch's results bit for bit and is faster."""
    import time

    import torch

    from tightfit.runtime.engine.weights.layout import Entry
    from tightfit.runtime.engine.weights.store import unpack

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
            # Makes scales and minima finite float16 numbers: of every magnitude, negative and subnormal ones too, no
            # NaN.
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
