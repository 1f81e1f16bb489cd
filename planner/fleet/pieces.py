"""The trained tensors in the pieces in which they pass between the members of a fleet, and the memory that this takes."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.planner.fleet.schema import BUFFERS, PIECE_BYTES, Shelf
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Floor, Profile, Tensor
from tightfit.runtime.engine.fleet.message import paged

FILE_BYTES = 64 << 10
"""a shelf on disk copies what is not whole pages through a buffer of this size; set aside for either kind, so that a
shelf on disk is never the larger one"""


def trained_tensors(source: Profile | Plan) -> list[Tensor]:
    """The tensors that are trained, in the profile's order, which all members share."""
    return [tensor for tensor in source.tensors if tensor.kind == "trainable"]


def pieces_of(source: Profile | Plan) -> tuple[int, ...]:
    """Bytes of each piece, in the order in which pieces pass: whole neighbouring tensors, `PIECE_BYTES` or less, where
    no tensor alone is larger.
    """
    result: list[int] = []
    for tensor in trained_tensors(source):
        if not result or (result[-1] and result[-1] + tensor.bytes > PIECE_BYTES):
            result.append(0)
        result[-1] += tensor.bytes
    return tuple(result)


def slots_of(micro_batches: int, *, first: bool) -> int:
    """Rows of a member's shelf of gradients: one for each micro-batch, but the first of the chain adds its own up."""
    return 1 if first else micro_batches


def exchange_bytes(floor: Floor, pieces: Sequence[int], *, slots: int, gradients: Shelf, states: Shelf) -> int:
    """Bytes that a member holds for the exchange alone, on top of what its plan's schedule needs."""
    total = paged(sum(pieces))
    held = floor.transport_bytes + BUFFERS * paged(max(pieces, default=0)) + 2 * FILE_BYTES
    held += slots * total if gradients == "memory" else 0
    return held + (2 * total if states == "memory" else 0)
