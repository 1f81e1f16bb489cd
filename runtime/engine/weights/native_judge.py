"""Judges the compiled library of `tightfit.runtime.engine.weights.native`: in which formats it gives PyTorch's results,
and sooner.

Run as a module, in a process of its own, with the library's path; prints the names as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.common import machine_code
from tightfit.runtime.engine.weights.layout import BLOCKS, Entry, group_bytes
from tightfit.runtime.engine.weights.native import ARGUMENTS, DOT, DOT_ARGUMENTS, DOTS, FORMATS, PREFIX, Dot
from tightfit.runtime.engine.weights.store import unpack

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
    "mxfp4": (0,),
}
"""Places in a group, by format, of the highest bytes of its floating-point numbers."""


def random_groups(kind: str, group: int, count: int, seed: int = 0) -> Tensor:
    """Random packed groups, uint8 [count, bytes of one].

    Their floating-point numbers are finite: of every magnitude, negative and subnormal ones too, no NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (count, group_bytes(kind, group)), dtype=torch.uint8, generator=generator)
    for byte in SCALES[kind]:
        packed[:, byte] &= 0xBB
    return packed


def judge(path: str) -> list[str]:
    """The names in `FORMATS` for which the library equals PyTorch's results bit for bit and is faster, and those in
    `DOTS` for which it unpacks equally and the products are right.

    PyTorch's way takes at least ten times as long for all formats but q4 and q8, which are therefore the only ones
    timed.
    """

    def seconds(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return min(times)

    names, right = [], set()
    for name, compiled in machine_code.load_functions(path, PREFIX, list(FORMATS), ARGUMENTS).items():
        kind, dtype = name.rsplit("_", 1)
        equal, faster = True, kind not in ("q4", "q8")
        for rows, columns, size in ((3, 36, 18), (5, 64, 32), (64, 96, 16), (1536, 576, 32)):
            group = BLOCKS[kind][0] if kind in BLOCKS else size
            shape = (rows, -(-columns // group) * group)
            entry = Entry(name="w", shape=shape, format=kind, group=group)
            groups = entry.rows * entry.columns // group
            packed = random_groups(kind, group, groups)
            out, expected = (torch.empty(shape, dtype=getattr(torch, dtype)) for _ in range(2))
            arguments = (packed.data_ptr(), out.data_ptr(), groups, group, packed.shape[1])
            compiled(*arguments)
            unpack(entry, packed.view(-1), expected)
            equal = equal and torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
            if not faster and groups * group > 1 << 19:
                faster = any(
                    seconds(lambda: compiled(*arguments)) < seconds(lambda: unpack(entry, packed.view(-1), expected))  # noqa: B023  called here
                    for _ in range(TRIES)
                )
        if equal:
            right.add(name)
        if equal and faster:
            names.append(name)
    for name, dot in machine_code.load_functions(path, PREFIX, DOTS, DOT_ARGUMENTS).items():
        if f"{name.removeprefix(DOT)}_float32" in right and _right(name, dot):
            names.append(name)
    return names


def _right(name: str, dot: Dot) -> bool:
    """Whether products with packed rows are those of PyTorch with the rows unpacked."""
    kind = name.removeprefix(DOT)
    for rows, columns, size in ((3, 36, 18), (5, 64, 32), (600, 96, 16)):
        group = BLOCKS[kind][0] if kind in BLOCKS else size
        entry = Entry(name="w", shape=(rows, -(-columns // group) * group), format=kind, group=group)
        packed = random_groups(kind, group, entry.rows * entry.columns // group)
        weight, x, y = torch.empty(entry.shape), torch.linspace(-1, 1, entry.columns), torch.empty(rows)
        unpack(entry, packed.view(-1), weight)
        dot(packed.data_ptr(), x.data_ptr(), y.data_ptr(), rows, entry.columns // group, group, packed.shape[1])
        exact, bound = weight.double() @ x.double(), weight.double().abs() @ x.double().abs()
        if not ((y.double() - exact).abs() <= 1e-5 * bound).all():
            return False
    return True


if __name__ == "__main__":
    sys.stdout.write(json.dumps(judge(sys.argv[1])))
