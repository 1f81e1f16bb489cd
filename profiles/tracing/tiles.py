"""A layer that is computed in tiles: parts of the batch that go through it one after the other."""

from __future__ import annotations

from tightfit.profiles.schema import Program


def equal_tiles(program: Program, tiles: int) -> int:
    """`tiles` if the program's forward consists of so many equal runs of operators, else 1."""
    forward = [operator for operator in program.operators if operator.phase == "forward"]
    length, rest = divmod(len(forward), tiles)
    if rest or not length:
        return 1
    runs = [
        [operator.target for operator in forward[start : start + length]] for start in range(0, len(forward), length)
    ]
    return tiles if all(run == runs[0] for run in runs) else 1
