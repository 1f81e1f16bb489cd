"""Leaves elements out in compiled C (``dropout.c``) where there is a C compiler: in a fifth of the time of PyTorch.

The library is used for a width of elements if it gives what plain integers give. Lean processes find it through the
environment variable `VARIABLE`, as that of `tightfit.runtime.engine.weights.native`.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

from tightfit.runtime.common import machine_code

VARIABLE = "TIGHTFIT_DROPOUT"
"""Environment variable with the library's path; empty: PyTorch alone."""
SOURCE = Path(__file__).with_name("dropout.c")
FLAGS = ("-O3", "-march=native", "-fopenmp")
WIDTHS = {"16": "h", "32": "i"}
"""bits of an element -> the array type of such integers"""
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""SplitMix64's steps: z ^= z >> shift; z *= factor"""
CASES = ((5, 7, 0, 0x8000), (3, 1000, 2, 0x1234), (40, 900, 7, 0xFFFF))
"""rows, columns, first row and threshold of the matrices that are tested"""
LeaveOut = Callable[[int, int, int, int, int, int, int, int, int], None]
"""(address of x, elements from row to row, the same of the output, rows, columns, first row, key, threshold - 32768)"""
PREFIX = "tightfit_leave_out_"
_ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = (_ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _NUMBER, ctypes.c_int)


def leave_out(bits: int) -> LeaveOut | None:
    """The function for elements of so many bits; None if there is none."""
    return _functions(os.environ.get(VARIABLE, "")).get(str(bits))


@functools.cache
def _functions(path: str) -> dict[str, LeaveOut]:
    return machine_code.functions(path, PREFIX, ARGUMENTS)


def library(cache: Path) -> str:
    """Path of the tested library in `cache`, built now if need be; empty if it cannot be built or is wrong."""
    if os.environ.get(VARIABLE) is not None:
        return os.environ[VARIABLE]
    return machine_code.library(SOURCE, FLAGS, cache, "tightfit.runtime.engine.cpu.native_dropout", {VARIABLE: ""})


def words(key: int, first: int, count: int) -> list[int]:
    """Words of SplitMix64's stream `key` from number `first`, from 0, on, in plain integers."""
    last, stream = (1 << 64) - 1, []
    for number in range(first + 1, first + 1 + count):
        z = (key + number * GOLDEN) & last
        for shift, factor in MIX:
            z = ((z ^ (z >> shift)) * factor) & last
        stream.append(z)
    return stream


def judge(path: str) -> list[str]:
    """The widths for which the library leaves out what it should, out of place and in place."""
    return [
        bits
        for bits, function in machine_code.load_functions(path, PREFIX, list(WIDTHS), ARGUMENTS).items()
        if all(_right(bits, function, *c) for c in CASES)
    ]


def _right(bits: str, function: LeaveOut, rows: int, columns: int, first: int, threshold: int) -> bool:
    key, stride = -0x123456789ABCDEF, columns + 3
    words_per_row = -(-columns // 4)
    chances = array("H")
    chances.frombytes(array("Q", words(key, first * words_per_row, rows * words_per_row)).tobytes())
    x = array(WIDTHS[bits], [number % 30000 + 1 for number in range(rows * stride)])
    expected = array(WIDTHS[bits], x)
    for row in range(rows):
        for column in range(columns):
            if chances[4 * words_per_row * row + column] ^ 0x8000 < threshold:
                expected[row * stride + column] = 0
    out = array(WIDTHS[bits], x)
    address, signed = x.buffer_info()[0], threshold - 0x8000
    function(address, stride, out.buffer_info()[0], stride, rows, columns, first, key, signed)
    out_of_place = out == expected
    function(address, stride, address, stride, rows, columns, first, key, signed)
    return out_of_place and x == expected


if __name__ == "__main__":
    sys.stdout.write(json.dumps(judge(sys.argv[1])))
