"""A hand-written decoder as the step of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tightfit.profiles.models.decoder import Attention, Decoder, rotary_table
from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.tracing.answer_ops import attend


class CachedAttention(Attention):
    """Attention to a cache, which is not part of it."""

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        shape = self.shape
        return attend(q, k, v, cos, sin, shape.kv_heads, shape.head_dim, self.window, shape.attention_scale)  # type: ignore[no-any-return]


class AnsweringFamily(Decoder):
    """forward(input_ids [1, t], positions [1, t]) -> hidden states float32 [t, H], as the head wants them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        with torch.device("meta"):
            super().__init__(decoder_shape(dict(config)), dtype=torch.float32, lora=None, attention=CachedAttention)

    def without_values(self) -> AbstractContextManager[Any]:
        """Within this context it is traced: its parameters lie on the meta device, and a few tokens in memory."""
        return nullcontext()

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        shape, (hidden,) = self.shape, self._embedded(input_ids)
        places = positions.reshape(-1).to(torch.float32)
        tables = {rotation: rotary_table(shape, places, *rotation) for rotation in sorted(set(shape.rotations))}
        for number, layer in self.model.layers.named_children():
            hidden = layer(hidden, *tables[shape.rotations[int(number)]])
        return self.ended(hidden)

    def refuse(self) -> str | None:
        """Why its code, which has been traced, cannot answer with a cache: nothing speaks against it."""
        return None
