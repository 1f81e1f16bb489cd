"""The side network of MobiLLM (Li et al. 2025, arXiv 2502.20421) as a module: adapters beside a frozen decoder.

The decoder runs elsewhere and hands over the outputs of some of its blocks; no gradient goes back. An adapter reads one
of them and the state that the adapters before it have made, mixed by a trained gate, and adds its output to the state.
The last state is added to the decoder's last hidden state, from which the decoder's own final norm and head make the
loss. The paper leaves open how the inputs are scaled and how the state is carried on: here each activation is divided
by its root mean square, because the scale of hidden states grows with depth, and the state is a residual stream, so
that a side network whose up projections are zero is the decoder itself.

Shapes: T = batch * seq flat tokens, H = hidden size, R = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightfit.profiles.models.decoder import Norm
from tightfit.profiles.models.decoder_config import DecoderShape
from tightfit.profiles.models.decoder_module import Table
from tightfit.profiles.models.factor import Factor
from tightfit.profiles.models.saved_modules import slice_rows
from tightfit.profiles.models.side_shape import SideShape
from tightfit.profiles.tracing.torch_ops import head_loss


class FirstAdapter(nn.Module):
    """state = up(silu(down(a / rms(a)))): the first adapter, before which there is no state."""

    def __init__(self, hidden: int, rank: int, eps: float) -> None:
        super().__init__()
        self.down, self.up = Factor(rank, hidden), Factor(hidden, rank)
        self.eps = eps

    def forward(self, activation: Tensor) -> Tensor:
        """activation [T, H] of the decoder's type; returns float32 [T, H]."""
        return self._adapted(self._scaled(activation))

    def _scaled(self, activation: Tensor) -> Tensor:
        wide = activation.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)

    def _adapted(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.down.weight)), self.up.weight)


class SideAdapter(FirstAdapter):
    """state + up(silu(down(g a / rms(a) + (1 - g) state))) with g = sigmoid(gate)."""

    def __init__(self, hidden: int, rank: int, eps: float) -> None:
        super().__init__(hidden, rank, eps)
        self.gate = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, activation: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        """activation [T, H] of the decoder's type, state float32 [T, H]; returns float32 [T, H]."""
        share = torch.sigmoid(self.gate)
        return state + self._adapted(share * self._scaled(activation) + (1.0 - share) * state)


class FrozenEnds(nn.Module):
    """The parts of the decoder that its loss is made with, under the decoder's names."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = Norm(shape.hidden, shape)
        if shape.tied:
            self.embed_tokens = Table(shape.vocab, shape.hidden, dtype)


class SideNetwork(nn.Module):
    """forward(labels [batch, seq], an activation [T, H] for each block of `side`) -> (loss float32 [], token losses
    float32 [T]), with labels as `Decoder` takes them.
    """

    def __init__(self, shape: DecoderShape, side: SideShape, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = FrozenEnds(shape, dtype)
        if not shape.tied:
            self.lm_head = Table(shape.vocab, shape.hidden, dtype)
        self.side = nn.ModuleList(
            (SideAdapter if place else FirstAdapter)(shape.hidden, side.rank, shape.eps)
            for place in range(len(side.blocks))
        )
        self.shape = shape
        self.slice_rows = slice_rows(shape.vocab, shape.hidden, dtype.itemsize)

    def forward(self, labels: Tensor, *activations: Tensor) -> tuple[Tensor, Tensor]:
        state = self.side[0](activations[0])
        for adapter, activation in zip(list(self.side)[1:], activations[1:], strict=True):
            state = adapter(activation, state)
        last = activations[-1]
        hidden = (last.float() + state).to(last.dtype)
        head = self.model.embed_tokens if self.shape.tied else self.lm_head
        loss, token_losses, _ = head_loss(self.model.norm(hidden), head.weight, labels, self.slice_rows)
        return loss, token_losses
