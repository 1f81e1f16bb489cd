"""Names in the job of a process that generates, and keys of what it measures: no PyTorch is imported here."""

from __future__ import annotations

LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"
ROOM, PRODUCT = "block", "product"
"""names of the buffers, in a job's places, of an unpacked block and of its product with a group of rows"""
VALUES = "values"
"""name of the stretch of memory with the values of the programs"""
ATTEND, PROJECTION, GATHER = "tightfit.attend", "tightfit.projection", "tightfit.embed_rows"
"""operators of a traced step that are carried out with the cache, the packed matrices, and the store"""
OVERWRITING = ("tightfit.gated",)
"""operators whose output may lie where their first input lies, which they have read by then"""
HELD = ("weight", "constant")
"""kinds of values that come from the store"""
IDS, POSITIONS = "input_ids", "positions"
"""inputs of a traced step, int64 [1, tokens]: the new tokens, and their positions"""
STALL = "stall"
"""key of the seconds spent waiting for the disk"""


def unpack_key(kind: str, group: int, columns: int) -> str:
    """Key of unpacking a matrix of this format, groups of so many elements and so many columns."""
    return f"unpack {kind} {group} {columns}"


def multiply_key(rows: int, columns: int) -> str:
    """Key of multiplying `rows` rows of activations with a matrix of so many columns, a block right after it was
    unpacked.
    """
    return f"multiply {rows} {columns}"


def dot_key(kind: str, group: int, columns: int) -> str:
    """Key of multiplying one row of activations with the packed rows of a matrix, in compiled C."""
    return f"dot {kind} {group} {columns}"


def unpacked_key(rows: int, columns: int) -> str:
    """Key of multiplying `rows` rows of activations with a matrix that stays unpacked."""
    return f"unpacked {rows} {columns}"
