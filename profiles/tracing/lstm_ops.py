"""Registers the operators of `tightfit.runtime.engine.cpu.lstm` with torch for tracing, as
`tightfit.profiles.tracing.torch_ops` does the others, and has `nn.LSTM` use them.

PyTorch's own layers are traced as they run without oneDNN: some thirty operators for each token in each layer, some ten
thousand for a sequence of 100, and a small matrix product for each token where one product for all of them would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.profiles.tracing.torch_ops import Shape, _define, _library

lstm = _define(
    "lstm",
    "(Tensor x, Tensor hidden, Tensor cell, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, hidden, *_: (
        x.new_empty((*x.shape[:2], hidden.shape[1])),
        x.new_empty(hidden.shape),
        x.new_empty((*x.shape[:2], 4 * hidden.shape[1])),
        x.new_empty((*x.shape[:2], hidden.shape[1])),
    ),
)
lstm_backward = _define(
    "lstm_backward",
    "(Tensor? dy, Tensor? dends, Tensor x, Tensor hidden, Tensor cell, Tensor w_ih, Tensor w_hh, Tensor y, Tensor"
    " gates, Tensor cells, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda dy, dends, *tensors: (
        *(like.new_empty(like.shape) for like in tensors[:5]),
        tensors[6].new_empty(tensors[6].shape[-1]),
        tensors[6].new_empty(tensors[6].shape),
    ),
)


@register_flop_formula([torch.ops.tightfit.lstm])
def _lstm_flops(x: Shape, hidden: Shape, cell: Shape, w_ih: Shape, w_hh: Shape, *_: Any, **__: Any) -> int:
    """Of the products with inputs and states, for all tokens."""
    return 2 * x[0] * x[1] * w_ih[0] * (w_ih[1] + w_hh[1])


@register_flop_formula([torch.ops.tightfit.lstm_backward])
def _lstm_backward_flops(
    dy: Shape, dends: Shape, x: Shape, hidden: Shape, cell: Shape, w_ih: Shape, w_hh: Shape, *_: Any, **__: Any
) -> int:
    return 2 * _lstm_flops(x, hidden, cell, w_ih, w_hh)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, hidden, cell, w_ih, w_hh, b_ih, _, ctx.reverse = inputs
    ctx.biased = b_ih is not None
    y, _, gates, cells = output
    ctx.save_for_backward(x, hidden, cell, w_ih, w_hh, y, gates, cells)
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, dy: Tensor | None, dends: Tensor | None, *_: Any) -> Any:
    if dy is None and dends is None:
        return (None,) * 8
    *gradients, dbias, _ = lstm_backward(dy, dends, *ctx.saved_tensors, ctx.reverse)
    return *gradients, *((dbias, dbias) if ctx.biased else (None, None)), None


torch.library.register_autograd("tightfit::lstm", _grad, setup_context=_setup, lib=_library)

_torch_lstm: Callable[..., Any] = torch._VF.lstm
LeaveOut = Callable[[Tensor, float, bool], Tensor]


def lstm_of(leave_out: LeaveOut) -> Callable[..., Any]:
    """What takes the place of ``torch._VF.lstm``, which `nn.LSTM` calls: the operators above for sequences of equal
    length in float32 without projections, with dropout between layers by `leave_out` (x, p, whether in training);
    otherwise PyTorch's own.
    """

    def call(*arguments: Any) -> Any:
        if not _supported(arguments):
            return _torch_lstm(*arguments)
        x, states, weights, biased, layers, p, train, bidirectional, batch_first = arguments
        x = x.transpose(0, 1) if batch_first else x
        directions, per_direction = (2 if bidirectional else 1), (4 if biased else 2)
        hidden, cells = [], []
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                own_weights = weights[per_direction * index : per_direction * (index + 1)]
                parts = (*own_weights, None, None)[:4]
                y, end, _, _ = lstm(
                    x.contiguous(), *(state[index].contiguous() for state in states), *parts, direction == 1
                )
                outputs.append(y)
                hidden.append(y[0] if direction else y[-1])
                cells.append(end)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if layer < layers - 1:
                x = leave_out(x, p, train)
        return x.transpose(0, 1) if batch_first else x, torch.stack(hidden), torch.stack(cells)

    return call


def lstm_without_dropout(*arguments: Any) -> Any:
    """PyTorch's own layers with nothing left out between them, where `lstm_of` would replace them."""
    return _torch_lstm(*arguments[:5], 0.0, *arguments[6:]) if _supported(arguments) else _torch_lstm(*arguments)


def _supported(arguments: Sequence[Any]) -> bool:
    if len(arguments) != 9 or isinstance(arguments[1], Tensor):
        return False  # a packed sequence
    x, states, weights, biased, layers, _, _, bidirectional, _ = arguments
    per_direction = 4 if biased else 2
    return len(weights) == layers * (2 if bidirectional else 1) * per_direction and all(
        tensor.dtype is torch.float32 for tensor in (x, *states, *weights)
    )
