"""Unpacks weights in compiled C (``unpack.c``) where there is a C compiler, for the formats in which that pays, and
multiplies one row of activations with packed rows.

A format is used only if its results equal PyTorch's bit for bit and come faster. Lean processes find the library
through the environment variable `VARIABLE` (`tightfit.runtime.engine.start.process.child_environment` sets it) and
unpack all other formats with PyTorch.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from tightfit.runtime.common import machine_code
from tightfit.runtime.engine.weights.layout import QUANTISED

VARIABLE = "TIGHTFIT_NATIVE"
"""Environment variable with the library's path; empty: unpack with PyTorch alone."""
SOURCE = Path(__file__).with_name("unpack.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off")
FORMATS = tuple(f"{kind}_{dtype}" for kind in QUANTISED for dtype in ("bfloat16", "float32"))
Unpack = Callable[[int, int, int, int, int], None]
"""(address of packed groups, address of the output, groups, elements per group, bytes per group)"""
PREFIX = "tightfit_"
ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
Dot = Callable[[int, int, int, int, int, int, int], None]
"""(address of packed rows, of float32 x, of float32 y, rows, groups per row, elements per group, bytes per group): y =
W x
"""
DOT_ARGUMENTS = (*(ctypes.c_void_p,) * 3, ctypes.c_int64, *(ctypes.c_int,) * 3)
DOT = "dot_"
DOTS = tuple(f"{DOT}{kind}" for kind in QUANTISED)
LARGEST_GROUP = 256
"""elements of a group with which `Dot` works"""


def functions(path: str | None = None) -> dict[str, Unpack]:
    """The unpacking functions that were found equal and faster, by ``format_dtype``; none if there is no library.

    `path` is the library; by default the one in the environment.
    """
    return machine_code.functions(os.environ.get(VARIABLE, "") if path is None else path, PREFIX, ARGUMENTS, FORMATS)


def dots(path: str | None = None) -> dict[str, Dot]:
    """The products with packed rows that were found right, by ``format``; `path` as in `functions`."""
    products: dict[str, Dot] = machine_code.functions(
        os.environ.get(VARIABLE, "") if path is None else path, PREFIX, DOT_ARGUMENTS, DOTS
    )
    return {name.removeprefix(DOT): function for name, function in products.items()}


def library(cache: Path) -> str:
    """Path of the tested library in `cache`, built now if need be; empty if it cannot be built or no format is
    faster.
    """
    if os.environ.get(VARIABLE) is not None:
        return os.environ[VARIABLE]
    return machine_code.library(SOURCE, FLAGS, cache, "tightfit.runtime.engine.weights.native_judge", {VARIABLE: ""})
