"""Has a module's own dropout draw its masks as that of LoRA pairs does (`tightfit.runtime.engine.cpu.dropout`): no mask
is stored, what is left out may be made again, and evaluations leave nothing out.

PyTorch's functions are replaced while a module is traced, where `nn.Dropout`, `F.dropout` and attention call them.
Other operators that draw random numbers stay: their results are kept or offloaded, and never made again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.nn import functional

from tightfit.profiles.tracing.dropout_ops import dropout
from tightfit.profiles.tracing.lstm_ops import lstm_of, lstm_without_dropout

UNNUMBERED = -1
"""site of a dropout that has not got its number in its layer yet"""
DropoutFunction = Callable[[Tensor, float], Tensor]
_attention = functional.scaled_dot_product_attention


def dropout_traced() -> contextlib.AbstractContextManager[None]:
    """Within this context a module's dropout is the operator `tightfit.dropout`, for `number_dropouts` to number."""
    return _replaced(_elements, _channels)


def dropout_off() -> contextlib.AbstractContextManager[None]:
    """Within this context a module's dropout leaves nothing out."""
    return _replaced(lambda x, p: x, lambda x, p: x, traced=False)


def number_dropouts(layers: Iterable[Iterable[fx.Node]]) -> None:
    """Number the dropouts of each layer, given the nodes of each, from 0."""
    for nodes in layers:
        unplaced = (node for node in nodes if node.target is dropout and node.args[2] == UNNUMBERED)
        for site, node in enumerate(unplaced):
            node.args = (*node.args[:2], site)


def _elements(x: Tensor, p: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    masked: Tensor = dropout(rows.contiguous(), p, UNNUMBERED)
    return masked.view(x.shape)


def _channels(x: Tensor, p: float) -> Tensor:
    """x [N, C, ...] without whole channels."""
    mask: Tensor = dropout(x.new_ones(x.shape[:2]), p, UNNUMBERED)
    return x * mask.view(*x.shape[:2], *(1 for _ in x.shape[2:]))


@contextlib.contextmanager
def _replaced(elements: DropoutFunction, channels: DropoutFunction, *, traced: bool = True) -> Iterator[None]:
    """Within this context `elements` and `channels` replace PyTorch's dropouts and, with `traced`, `lstm_of` its
    `nn.LSTM`.
    """

    def of(leave_out: DropoutFunction, *, within: bool) -> Callable[[Tensor, float, bool], Tensor]:
        def call(x: Tensor, p: float, train: bool) -> Tensor:
            if not train or p == 0:
                return x
            result = leave_out(x, p) if p < 1 else torch.zeros_like(x)
            return x.copy_(result) if within else result

        return call

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p == 0:
            options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            result: Tensor = _attention(query, key, value, attn_mask, 0.0, is_causal, **options)
            return result
        weights = _weights(query, key, attn_mask, is_causal=is_causal, scale=scale)
        return elements(weights, dropout_p) @ _repeated(value, query)

    calls = {
        "dropout": of(elements, within=False),
        "dropout_": of(elements, within=True),
        "feature_dropout": of(channels, within=False),
        "feature_dropout_": of(channels, within=True),
    }
    recurrence = lstm_of(calls["dropout"]) if traced else lstm_without_dropout
    with contextlib.ExitStack() as stack:
        for name, call in calls.items():
            # torch.nn.functional calls those of torch._VF, which looks them up in torch's C code if it has none itself.
            stack.enter_context(mock.patch.object(torch._VF, name, call, create=True))
            stack.enter_context(mock.patch.object(torch, name, call))
        stack.enter_context(mock.patch.object(torch._VF, "lstm", recurrence, create=True))
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attention))
        yield


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float | None) -> Tensor:
    """The weights of `scaled_dot_product_attention` [..., L, S], as PyTorch computes them without a fused kernel."""
    root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = (query * root) @ (_repeated(key, query) * root).transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1)


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values with as many heads as the queries, which may share them."""
    if tensor.dim() < 3 or tensor.shape[-3] == query.shape[-3]:
        return tensor
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3)
