"""How llama.cpp writes a base: its names of tensors, and the order of their rows."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tightfit.profiles.models.decoder_config import decoder_shape, handwritten
from tightfit.profiles.models.family import GgufFacts, family_of
from tightfit.profiles.sources.gguf_rows import unpermuted_rows
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class LlamaCpp:
    """llama.cpp's form of `source`. Raises InputError, which names the `way` out, for a family of which tightfit does
    not know it.
    """

    def __init__(self, source: Source, way: str) -> None:
        family = family_of(source.config) if handwritten(source.config) else None
        if family is None or family.gguf is None:
            raise InputError(
                f"{source.name} is a {source.config.get('model_type')!r} model, whose form in llama.cpp tightfit does"
                f" not know; {way}"
            )
        self.facts: GgufFacts = family.gguf
        self._names = {theirs: ours for ours, theirs in self.facts.names.items()}
        self._head_dim = decoder_shape(source.config).head_dim

    def name(self, ours: str) -> str:
        """llama.cpp's name of a tensor."""
        stem, _, suffix = ours.rpartition(".")
        layer = _LAYER.fullmatch(stem)
        if layer:
            return f"blk.{layer[1]}.{self._names[layer[2]]}.{suffix}"
        return f"{self._names[stem]}.{suffix}"

    def rows_together(self, name: str) -> int:
        """How many rows of a tensor have to be in one block for `ordered`."""
        return self._head_dim if self._permuted(name) else 1

    def ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows of Hugging Face's order, [n, ...] with n a multiple of `rows_together`, in llama.cpp's."""
        if not self._permuted(name):
            return rows
        order = torch.argsort(unpermuted_rows(self._head_dim, 1))
        return rows.view(-1, self._head_dim, *rows.shape[1:])[:, order].reshape(rows.shape)

    def offset(self, name: str) -> float:
        """The number that llama.cpp adds to each value of a tensor."""
        return self.facts.norm_offset if name.endswith("norm.weight") else 0.0

    def _permuted(self, name: str) -> bool:
        return self.facts.permuted and ".self_attn." in name and ("q_proj" in name or "k_proj" in name)
