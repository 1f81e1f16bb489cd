"""A layer that is computed in tiles: parts of the batch that go through it one after the other."""

from __future__ import annotations

from tightfit.profiles.schema import Program


def in_tiles(program: Program, most: int) -> Program:
    """The program, which says of how many equal runs of operators, up to `most`, its forward begins with."""
    forward = [operator.target for operator in program.operators if operator.phase == "forward"]
    for tiles in range(most, 1, -1):
        if most % tiles:
            continue
        for length in range(len(forward) // tiles, MOST_AFTERWARDS, -1):
            if (
                len(forward) - tiles * length <= MOST_AFTERWARDS
                and forward[: length * tiles] == forward[:length] * tiles
            ):
                return program.model_copy(update={"tiles": tiles, "tile_operators": length})
    return program


MOST_AFTERWARDS = 4
"""operators that follow the last tile at most: what the tiles have made is put together"""
