"""The blocks in which a device multiplies the rows of an expert, for its kernels and for those who warm them."""

from functools import lru_cache

BLOCK_ROWS = (256, 128, 96, 80, 64, 48, 32, 16)
"""Sizes of a block, the largest first: oneDNN keeps code for each."""
OVERHEAD_ROWS = 20
"""Rows that take as long as what a product takes whatever its rows, which is to read the matrix (1536 x 2048 on two Zen 4 cores: 0.27 ms
and 0.014 ms a row)."""


@lru_cache(maxsize=1 << 12)
def blocks_of(rows: int) -> tuple[int, ...]:
    """The sizes of the blocks for so many rows that take the least time; the last one may have room for more."""
    if rows <= 0:
        return ()
    if rows > BLOCK_ROWS[0]:
        return (BLOCK_ROWS[0], *blocks_of(rows - BLOCK_ROWS[0]))
    smallest = min(size for size in BLOCK_ROWS if size >= rows)
    divided = [(size, *blocks_of(rows - size)) for size in BLOCK_ROWS if size < rows]
    return min([(smallest,), *divided], key=lambda sizes: sum(sizes) + OVERHEAD_ROWS * len(sizes))
