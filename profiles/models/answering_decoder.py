"""A decoder that transformers builds, as the step of an answer: new tokens and their positions in, hidden states out,
and attention to a cache that is not part of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tightfit.profiles.models.decoder_module import without_values
from tightfit.profiles.models.transformers_decoder import AnyDecoder

MOST_SEEN = 1 << 17
"""tokens up to which a model's attention masks are looked at, where its config names no length"""


class AnsweringDecoder(AnyDecoder):
    """forward(input_ids [1, t], positions [1, t]) -> hidden states float32 [t, H], as the head wants them.

    `longest` is the number of tokens of a prompt and its answer. Raises InputError as `AnyDecoder` does.
    """

    def __init__(self, config: Mapping[str, Any], *, tokens: int, longest: int) -> None:
        super().__init__(config, dtype=torch.float32, seq=tokens, lora=None, longest=longest)
        self.context.answering = getattr(self.model.config, "max_position_embeddings", None) or MOST_SEEN

    @contextmanager
    def without_values(self) -> Iterator[None]:
        """Within this context it is traced, and nothing has values."""
        with FakeTensorMode():
            without_values(self)
            yield

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        def body(ids: Tensor, places: Tensor) -> Tensor:
            hidden: Tensor = self.model(input_ids=ids, position_ids=places, use_cache=False)[0]
            return hidden.reshape(-1, hidden.shape[-1]) * self.scale

        with self.recognition.active():  # operators that write in place become such as do not
            return torch.func.functionalize(body, remove="mutations")(input_ids, positions)  # type: ignore[no-any-return]

    def refuse_by_modules(self) -> str | None:
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return "its code takes no positions"
        why = super().refuse_by_modules()
        return why or (f"its {self.mixing} mixes neighbouring tokens" if self.mixing else None)

    def refuse(self) -> str | None:
        """Why its code, which has been traced, cannot answer with a cache; None: it can."""
        layers = self.model.config.num_hidden_layers
        if self.context.others:
            return f"its {self.context.others[0]} computes more than tightfit's attention"
        if self.context.attended != layers:
            return f"attention is recognised in {self.context.attended} of its {layers} layers"
        return None
