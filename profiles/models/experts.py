"""The experts of a mixture's layer, for decoders written by hand and for those of transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tightfit.profiles.models.factor import Factor, FactorPair
from tightfit.profiles.models.lora import Pair
from tightfit.profiles.tracing.expert_ops import mixture

CALLS = 8
"""parts in which the experts of a layer are read, unpacked and multiplied, at least: more are more instructions of a
plan, and less is in memory at a time
"""


class Experts(nn.Module):
    """forward(x [T, H], index int64 [T, k], weights [T, k]) -> [T, H]: for each row the weighted sum of what its
    experts make of it.

    The matrices of all experts, which are frozen, stand below one another, under transformers' names: `gate_up_proj` [E
    * 2 * F, H] has of each expert the rows of its gate and then those of its up, `down_proj` is [E * H, F]; with biases
    `gate_up_proj_bias` is [E, 2 * F] and `down_proj_bias` [E, H], float32. LoRA pairs have the names that PEFT gives
    them where both matrices are among its `target_parameters`: that of gates and ups is under `base_layer`.
    """

    pair: Pair | None = None
    """Of each expert's two matrices."""

    def __init__(
        self, count: int, hidden: int, width: int, activation: str, dtype: torch.dtype, *, biased: bool = False
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = nn.Parameter(torch.empty(count * 2 * width, hidden, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(count * hidden, width, dtype=dtype), requires_grad=False)
        self.gate_up_proj_bias = self.down_proj_bias = None
        if biased:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(count, 2 * width), requires_grad=False)
            self.down_proj_bias = nn.Parameter(torch.empty(count, hidden), requires_grad=False)
        self.count, self.width = count, width
        self.at_once = count
        """Experts whose matrices are read, unpacked and multiplied together."""
        self.adaptable = True
        """Whether it may get pairs."""

    def adapt(self, pair: Pair) -> None:
        """Give all experts LoRA pairs."""
        self.pair = pair
        hidden, rows = self.gate_up_proj.shape[1], pair.rank * self.count
        self.base_layer = FactorPair(rows, hidden, 2 * self.width)
        self.lora_A, self.lora_B = Factor(rows, self.width), Factor(hidden, rows)

    def slice(self, rows: int | None, most_bytes: int) -> None:
        """Take experts together of whose gates and ups there are so many rows; None: as many as `most_bytes` hold
        unpacked, in `CALLS` parts at least. It is a power of two, and one at least.
        """
        expert_bytes = (self.gate_up_proj.nbytes + self.down_proj.nbytes) // self.count
        together = rows // (2 * self.width) if rows else min(most_bytes // expert_bytes, -(-self.count // CALLS))
        self.at_once = 1 << (max(1, min(together, self.count)).bit_length() - 1)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        matrices = self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias
        pairs: list[Tensor | None] = [None] * 4
        scale = 0.0
        if self.pair is not None:
            factors = self.base_layer.lora_A, self.base_layer.lora_B, self.lora_A, self.lora_B
            pairs, scale = [factor.weight for factor in factors], self.pair.scale
        return mixture(x, index, weights, *matrices, self.activation, self.at_once, *pairs, scale)  # type: ignore[no-any-return]
