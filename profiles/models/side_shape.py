"""What a side network is made of: the blocks of a decoder whose outputs it reads, and the rank of its adapters.

PyTorch is not imported here, since plans are made without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightfit.runtime.common.errors import InputError

CONFIG_KEY = "side_network"
"""of a model's config: the side network that is trained beside the model, in the form of `SideShape.as_json`"""
BLOCKS, RANK = 8, 64
"""defaults: how many blocks are read, and the width of the adapters"""
INPUT = "side_input"
"""names of the activations that a side network takes: ``side_input.0`` and so on"""


@dataclass(frozen=True, kw_only=True)
class SideShape:
    """A side network with an adapter for each of some blocks of a decoder, the last one among them."""

    blocks: tuple[int, ...]
    """indices of the blocks whose outputs are read, in ascending order; the last is the decoder's last block"""
    rank: int
    """width between an adapter's two projections"""

    def as_json(self) -> dict[str, Any]:
        return {"blocks": list(self.blocks), "rank": self.rank}


def chosen_blocks(layers: int, count: int = BLOCKS) -> tuple[int, ...]:
    """The last of `layers` blocks and others at even distances below it, `count` in all, or all blocks if there are
    fewer. Raises InputError for a `count` below 1.
    """
    if count < 1:
        raise InputError(f"a side network reads the outputs of at least 1 block, not of {count}")
    count = min(count, layers)
    return tuple(-(-layers * place // count) - 1 for place in range(1, count + 1))


def check_blocks(blocks: tuple[int, ...], layers: int) -> None:
    """Raise InputError unless `blocks` are in ascending order and end with the last of `layers` blocks."""
    ascending = list(blocks) == sorted(set(blocks))
    if not blocks or not ascending or blocks[0] < 0 or blocks[-1] != layers - 1:
        raise InputError(
            f"a side network cannot read the blocks {', '.join(map(str, blocks)) or 'of an empty list'} of a model with"
            f" {layers}: give indices from 0 in ascending order, the last of them {layers - 1}"
        )
