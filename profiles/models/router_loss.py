"""What a forward collects for the loss of a mixture's routers (`tightfit.runtime.engine.cpu.router_loss`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.profiles.tracing.router_ops import counted_tokens, router_loss, router_totals


@dataclass(frozen=True)
class RouterLoss:
    """A model's loss of its routers."""

    chosen: int
    """experts of a token"""
    coefficient: float
    """what it is multiplied by before it is added to the loss of the tokens"""
    layers: int
    """that have a router; a trace may have fewer, where one stands for others"""


class RouterSums:
    """Sums of the scores of all routers that the tokens of a batch go through, for each of its tiles by itself."""

    def __init__(self, told: RouterLoss, counted: Tensor, tiles: int = 1) -> None:
        """`counted`, float32 [T], tells tokens from padding (`counted_tokens`); each tile has equally many of them."""
        self.told, self.counted = told, counted
        self._parts = counted.chunk(tiles) if tiles > 1 else (counted,)
        self._totals: list[Tensor | None] = [None] * tiles

    def add(self, scores: Tensor, tile: int = 0) -> None:
        """Add the scores [tokens of a tile, experts] of a layer's router."""
        self._totals[tile] = router_totals(self._totals[tile], scores, self._parts[tile], self.told.chosen)

    def loss(self) -> Tensor:
        """The loss of the batch, float32 [], times its coefficient."""
        totals = [total for total in self._totals if total is not None]
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
        return router_loss(total, self.counted, self.told.layers, self.told.coefficient)[0]  # type: ignore[no-any-return]


def sums_of_batch(told: RouterLoss | None, labels: Tensor, tiles: int = 1) -> RouterSums | None:
    """A place for the sums of a batch, labels int64 [batch, seq]; None without a loss of routers."""
    return None if told is None else RouterSums(told, counted_tokens(labels), tiles)
