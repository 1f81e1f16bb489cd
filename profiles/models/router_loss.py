"""What a forward collects for the loss of a mixture's routers (`tightfit.runtime.engine.cpu.router_loss`)."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass
class RouterSums:
    """Sums of the scores of all routers that a tile's tokens went through; `counted` float32 [T] tells them from padding."""

    told: RouterLoss
    counted: Tensor
    total: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        """Add those of a layer, scores [T, experts]."""
        self.total = router_totals(self.total, scores, self.counted, self.told.chosen)


def sums_of_tiles(told: RouterLoss | None, labels: Tensor, tiles: int) -> list[RouterSums]:
    """A place for the sums of each tile, of equally many tokens; none without a loss. labels int64 [batch, seq]."""
    if told is None:
        return []
    counted = counted_tokens(labels)
    return [RouterSums(told, part) for part in (counted.chunk(tiles) if tiles > 1 else [counted])]


def loss_of(sums: Sequence[RouterSums]) -> Tensor:
    """The loss of a batch, float32 [], times its coefficient, given the sums of its tiles."""
    totals = [each.total for each in sums if each.total is not None]
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
    counted = sums[0].counted if len(sums) == 1 else torch.cat([each.counted for each in sums])
    told = sums[0].told
    return router_loss(total, counted, told.layers, told.coefficient)[0]  # type: ignore[no-any-return]
