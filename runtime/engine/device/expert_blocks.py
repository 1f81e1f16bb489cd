"""The blocks in which a device multiplies the rows of an expert, for its kernels and for those who warm them."""

from functools import lru_cache

BLOCK_ROWS = (256, 128, 80, 64, 16)
"""Sizes of a block, the largest first. oneDNN keeps code for each, 2 MiB for the products of one size of experts; with
eight sizes experts of 64 rows on average would take 1 % less time, of very unlike numbers of rows 7 %.
"""
OVERHEAD_ROWS = 20
"""Rows that take as long as what a product takes whatever its rows, which is to read the matrix (1536 x 2048 on two Zen
4 cores: 0.27 ms and 0.014 ms a row).
"""


def largest_block(tokens: int) -> int:
    """The size of the largest block where an expert has at most so many rows."""
    return min((size for size in BLOCK_ROWS if size >= tokens), default=BLOCK_ROWS[0])


@lru_cache(maxsize=1 << 12)
def blocks_of(rows: int, largest: int) -> tuple[int, ...]:
    """The sizes of the blocks, of at most `largest` rows, for so many rows that take the least time; the last one may
    have room for more.
    """
    if rows <= 0:
        return ()
    if rows > largest:
        return (largest, *blocks_of(rows - largest, largest))
    divided = [(size, *blocks_of(rows - size, largest)) for size in BLOCK_ROWS if size < rows]
    return min([(largest_block(rows),), *divided], key=lambda sizes: sum(sizes) + OVERHEAD_ROWS * len(sizes))
