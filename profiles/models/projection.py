"""The projections of decoders, hand-written and transformers', with LoRA pairs in float32 where these are chosen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.profiles.models.experts import Experts
from tightfit.profiles.models.factor import Factor
from tightfit.profiles.models.lora import OF_EXPERTS, LoraConfig, Pair
from tightfit.profiles.models.saved_modules import slice_rows
from tightfit.profiles.tracing.dora_ops import dora_norm, dora_scale
from tightfit.profiles.tracing.dropout_ops import dropout, dropout_lora_linear
from tightfit.profiles.tracing.torch_ops import frozen_linear, lora_linear
from tightfit.runtime.engine.training.adapter import BODY, peft_name

MATRIX_BYTES = 64 << 20
"""largest frozen matrix, unpacked, that is read, unpacked and multiplied as a whole; of larger ones, slices are"""


class Magnitude(nn.Module):
    """The lengths of a projection's rows, which DoRA trains, float32."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, dtype=torch.float32))


class Projection(nn.Module):
    """Frozen x @ W.T (+ bias) plus, where it has a pair, the trained scale * x @ A.T @ B.T; with DoRA the rows of W +
    scale * B @ A are given trained lengths.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float32), requires_grad=False) if bias else None
        self.adaptable = True
        """Whether it may get a pair."""
        self.pair: Pair | None = None
        self.site = 0
        """Number among the projections of its layer, by which their dropout masks differ."""
        self.slice_rows = outputs
        """Rows of the frozen matrix that are read, unpacked and multiplied at a time."""

    def adapt(self, pair: Pair) -> None:
        """Give it a LoRA pair."""
        outputs, inputs = self.weight.shape
        self.pair = pair
        self.lora_A, self.lora_B = Factor(pair.rank, inputs), Factor(outputs, pair.rank)
        if pair.dora:
            self.lora_magnitude_vector = Magnitude(outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.pair is None:
            return frozen_linear(x, self.weight, self.bias, self.slice_rows)  # type: ignore[no-any-return]
        factors = self.lora_A.weight, self.lora_B.weight
        if self.pair.dora:
            return self._of_magnitude(x, self.pair)
        if self.pair.dropout:
            settings = self.pair.scale, self.pair.dropout, self.site
            return dropout_lora_linear(x, self.weight, self.bias, *factors, *settings)[0]  # type: ignore[no-any-return]
        return lora_linear(x, self.weight, self.bias, *factors, self.pair.scale, self.slice_rows)[0]  # type: ignore[no-any-return]

    def _of_magnitude(self, x: Tensor, pair: Pair) -> Tensor:
        """With dropout, as in PEFT, all that is scaled reads what is left of the input, the frozen weight as well, and
        only what W x lacks then is not scaled.
        """
        left = dropped(x, pair, self.site)
        factors = self.lora_A.weight, self.lora_B.weight
        z, _ = lora_linear(left, self.weight, None, *factors, pair.scale, self.slice_rows)
        # Right after the product, while the unpacked weight is there.
        norm, _ = dora_norm(self.weight, *factors, pair.scale)
        magnitude = self.lora_magnitude_vector.weight
        if not pair.dropout:
            return dora_scale(z, magnitude, norm, self.bias)[0]  # type: ignore[no-any-return]
        scaled, _ = dora_scale(z, magnitude, norm, None)
        return scaled + frozen_linear(x - left, self.weight, self.bias, self.slice_rows)  # type: ignore[no-any-return]


def dropped(x: Tensor, pair: Pair, site: int) -> Tensor:
    """The pair's input x [T, I] after dropout, as a tensor of its own. Without dropout x itself."""
    return dropout(x, pair.dropout, site) if pair.dropout else x


def adapt(module: nn.Module, lora: LoraConfig, model: str, body: str = BODY) -> dict[str, Any]:
    """Give pairs to the projections of a decoder that are chosen; what a profile says of the adapter.

    `model` is its name in messages, `body` what adapters call its layers. Raises InputError as `LoraConfig.chosen`
    does.
    """
    found = {
        peft_name(name, body): child
        for name, child in module.named_modules()
        if isinstance(child, Projection) and child.adaptable
    }
    for child, site in zip(found.values(), _sites(found)):
        child.site = site
    experts = {
        peft_name(name, body): child
        for name, child in module.named_modules()
        if isinstance(child, Experts) and child.adaptable
    }
    chosen_experts = lora.chosen_experts(list(experts), model)
    parameters = [f"{name}.{parameter}" for name in chosen_experts for parameter in OF_EXPERTS]
    chosen = lora.chosen(list(found), model, parameters)
    for name, pair in chosen.items():
        found[name].adapt(pair)
    for name, pair in chosen_experts.items():
        experts[name].adapt(pair)
    return lora.as_json(list(found), list(chosen), body, list(chosen_experts))


def slice_matrices(module: nn.Module, rows: int | None) -> None:
    """Have the projections of a decoder, which has its pairs, read, unpack and multiply so many rows of their frozen
    matrices at a time; None: as many as `MATRIX_BYTES` hold. Those with DoRA or dropout take all rows at once, and
    mixtures whole experts.
    """
    for child in module.modules():
        if isinstance(child, Experts):
            child.slice(rows, MATRIX_BYTES)
        if not isinstance(child, Projection) or not child.adaptable:
            continue
        if child.pair is not None and (child.pair.dora or child.pair.dropout):
            continue
        outputs, inputs = child.weight.shape
        itemsize = child.weight.dtype.itemsize
        child.slice_rows = min(outputs, rows or slice_rows(outputs, inputs, itemsize, MATRIX_BYTES))


def _sites(names: Iterable[str]) -> Iterator[int]:
    """Of each projection its number among those of its layer, from 0: the same in all layers that are alike."""
    counts: Counter[str] = Counter()
    for name in names:
        layer = re.match(r".*?\.\d+(?=\.)", name)
        key = layer[0] if layer else ""
        yield counts[key]
        counts[key] += 1
