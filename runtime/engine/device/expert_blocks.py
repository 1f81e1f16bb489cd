"""The sizes of the blocks in which a device multiplies the rows of an expert, for its kernels and for those who warm them."""

BLOCK_ROWS = (256, 128, 64, 16)
"""The largest first. On a CPU a product of 16 rows takes a third of the time of one of 128, since the matrix is read for both."""
