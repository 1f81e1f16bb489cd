"""The experts of a mixture's layer, for decoders written by hand and for those of transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tightfit.profiles.tracing.expert_ops import experts_at_once, mixture


class Experts(nn.Module):
    """forward(x [T, H], index int64 [T, k], weights [T, k]) -> [T, H]: for each row the weighted sum of what its experts make of it.

    Frozen. The matrices of all experts stand below one another, under transformers' names: `gate_up_proj` [E * 2 * F, H] has of
    each expert the rows of its gate and then those of its up, `down_proj` is [E * H, F].
    """

    def __init__(self, count: int, hidden: int, width: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = nn.Parameter(torch.empty(count * 2 * width, hidden, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(count * hidden, width, dtype=dtype), requires_grad=False)
        self.at_once = experts_at_once(count, 3 * width * hidden * dtype.itemsize)
        """Experts whose matrices are read and unpacked together."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return mixture(x, index, weights, self.gate_up_proj, self.down_proj, self.activation, self.at_once)  # type: ignore[no-any-return]
