"""A layer that is computed in tiles: parts of the batch that go through it one after the other."""

from __future__ import annotations

from tightfit.profiles.schema import Program

MOST_AFTERWARDS = 4
"""operators that follow the last tile at most, by which what the tiles have made is put together; a tile has more"""


def in_tiles(program: Program, most: int) -> Program:
    """The program, which says of how many equal runs of operators, up to `most` and dividing it, its forward begins
    with.
    """
    forward = [operator.target for operator in program.operators if operator.phase == "forward"]
    for tiles in (count for count in range(most, 1, -1) if not most % count):
        for afterwards in range(MOST_AFTERWARDS + 1):
            length, rest = divmod(len(forward) - afterwards, tiles)
            if not rest and length > MOST_AFTERWARDS and forward[: length * tiles] == forward[:length] * tiles:
                return program.model_copy(update={"tiles": tiles, "tile_operators": length})
    return program
