"""Unpacks weights in compiled C (``unpack.c``) where there is a C compiler, for the formats in which that pays, and multiplies
one row of activations with packed rows.

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
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common import machine_code
from tightfit.runtime.engine.weights.layout import BLOCKS, QUANTISED, group_bytes

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "TIGHTFIT_NATIVE"
"""Environment variable with the library's path; empty: unpack with PyTorch alone."""
SOURCE = Path(__file__).with_name("unpack.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off")
FORMATS = tuple(f"{kind}_{dtype}" for kind in QUANTISED for dtype in ("bfloat16", "float32"))
TRIES = 5
"""How often compiled code is timed, at most, before it counts as slower: other work may have disturbed it."""
SCALES = {
    "q4": (-3, -1),
    "q4_zero": (-2,),
    "nf4": (-1,),
    "q8": (1,),
    "int8": (3,),
    "q5_0": (1,),
    "q5_1": (1, 3),
    "q2_k": (81, 83),
    "q3_k": (109,),
    "q4_k": (1, 3),
    "q5_k": (1, 3),
    "q6_k": (209,),
}
"""Places in a group, by format, of the highest bytes of its floating-point numbers."""
Unpack = Callable[[int, int, int, int, int], None]
"""(address of packed groups, address of the output, groups, elements per group, bytes per group)"""
PREFIX = "tightfit_"
ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
Dot = Callable[[int, int, int, int, int, int, int], None]
"""(address of packed rows, of float32 x, of float32 y, rows, groups per row, elements per group, bytes per group): y = W x"""
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
    found: dict[str, Dot] = machine_code.functions(
        os.environ.get(VARIABLE, "") if path is None else path, PREFIX, DOT_ARGUMENTS, DOTS
    )
    return {name.removeprefix(DOT): function for name, function in found.items()}


def library(cache: Path) -> str:
    """Path of the tested library in `cache`, built now if need be; empty if it cannot be built or no format is
    faster.
    """
    if os.environ.get(VARIABLE) is not None:
        return os.environ[VARIABLE]
    return machine_code.library(SOURCE, FLAGS, cache, "tightfit.runtime.engine.weights.native", {VARIABLE: ""})


def random_groups(kind: str, group: int, count: int, seed: int = 0) -> Tensor:
    """Random packed groups, uint8 [count, bytes of one].

    Their floating-point numbers are finite: of every magnitude, negative and subnormal ones too, no NaN.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (count, group_bytes(kind, group)), dtype=torch.uint8, generator=generator)
    for place in SCALES[kind]:
        packed[:, place] &= 0xBB
    return packed


def judge(path: str) -> list[str]:
    """The names in `FORMATS` for which the library equals PyTorch's results bit for bit and is faster, and those in `DOTS` for
    which it unpacks equally and the products are right.

    PyTorch's way takes at least ten times as long for all formats but q4 and q8, which are therefore the only ones timed.
    """
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

    chosen, right = [], set()
    for name, native in machine_code.loaded(path, PREFIX, list(FORMATS), ARGUMENTS).items():
        kind, dtype = name.rsplit("_", 1)
        equal, gained = True, kind not in ("q4", "q8")
        for rows, columns, size in ((3, 36, 18), (5, 64, 32), (64, 96, 16), (1536, 576, 32)):
            group = BLOCKS[kind][0] if kind in BLOCKS else size
            shape = (rows, -(-columns // group) * group)
            entry = Entry(name="w", shape=shape, format=kind, group=group)
            groups = entry.rows * entry.columns // group
            packed = random_groups(kind, group, groups)
            out, expected = (torch.empty(shape, dtype=getattr(torch, dtype)) for _ in range(2))
            arguments = (packed.data_ptr(), out.data_ptr(), groups, group, packed.shape[1])
            native(*arguments)
            unpack(entry, packed.view(-1), expected)
            equal = equal and torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
            if not gained and groups * group > 1 << 19:
                gained = any(
                    seconds(lambda: native(*arguments)) < seconds(lambda: unpack(entry, packed.view(-1), expected))  # noqa: B023  called here
                    for _ in range(TRIES)
                )
        if equal:
            right.add(name)
        if equal and gained:
            chosen.append(name)
    for name, dot in machine_code.loaded(path, PREFIX, DOTS, DOT_ARGUMENTS).items():
        if f"{name.removeprefix(DOT)}_float32" in right and _right(name, dot):
            chosen.append(name)
    return chosen


def _right(name: str, dot: Dot) -> bool:
    """Whether products with packed rows are those of PyTorch with the rows unpacked."""
    import torch

    from tightfit.runtime.engine.weights.layout import Entry
    from tightfit.runtime.engine.weights.store import unpack

    kind = name.removeprefix(DOT)
    for rows, columns, size in ((3, 36, 18), (5, 64, 32), (600, 96, 16)):
        group = BLOCKS[kind][0] if kind in BLOCKS else size
        entry = Entry(name="w", shape=(rows, -(-columns // group) * group), format=kind, group=group)
        packed = random_groups(kind, group, entry.rows * entry.columns // group)
        weight, x, y = torch.empty(entry.shape), torch.linspace(-1, 1, entry.columns), torch.empty(rows)
        unpack(entry, packed.view(-1), weight)
        dot(packed.data_ptr(), x.data_ptr(), y.data_ptr(), rows, entry.columns // group, group, packed.shape[1])
        exact, most = weight.double() @ x.double(), weight.double().abs() @ x.double().abs()
        if not ((y.double() - exact).abs() <= 1e-5 * most).all():
            return False
    return True


if __name__ == "__main__":
    sys.stdout.write(json.dumps(judge(sys.argv[1])))
