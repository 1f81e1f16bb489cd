"""One direction of one layer of an LSTM (Hochreiter and Schmidhuber 1997) over a whole sequence, and its gradients.

What does not depend on the state before is one matrix product for all times, in both directions of time: the inputs'
part of the gates, and the gradients of inputs and weights. Only the state's part of the gates, and its gradient, are
made time by time.

Shapes: x [T, N, I]; states [N, H]; w_ih [4 H, I], w_hh [4 H, H], biases [4 H], the gates in PyTorch's order: input,
forget, cell, output. With `reverse` the sequence is gone through from its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import onednn

aten = torch.ops.aten


def lstm(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
    *,
    out: Sequence[Tensor],
) -> None:
    """out: y [T, N, H], the hidden state at each time; [N, H], the cell state at the last one; the gates [T, N, 4 H]
    and the cell states [T, N, H], which the gradient needs. `hidden` and `cell` are the states before the first time.
    """
    with onednn(x.dtype):
        _forward(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, *out, reverse=reverse)


def _forward(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor,
    ends: Tensor,
    gates: Tensor,
    cells: Tensor,
    *,
    reverse: bool,
) -> None:
    flat = gates.view(-1, gates.shape[-1])
    inputs = x.view(-1, x.shape[-1])
    if b_ih is None or b_hh is None:
        aten.mm.out(inputs, w_ih.t(), out=flat)
    else:
        aten.addmm.out(b_ih + b_hh, inputs, w_ih.t(), out=flat)
    width = hidden.shape[1]
    weights, squashed = w_hh.t(), torch.empty_like(hidden)
    for time, _ in _times(len(x), reverse=reverse):
        time_gates = gates[time]
        time_gates.addmm_(hidden, weights)
        time_gates[:, : 2 * width].sigmoid_()
        time_gates[:, 2 * width : 3 * width].tanh_()
        time_gates[:, 3 * width :].sigmoid_()
        enter, forget, new, leave = time_gates.chunk(4, 1)
        torch.mul(forget, cell, out=cells[time])
        cell = cells[time].addcmul_(enter, new)
        torch.tanh(cell, out=squashed)
        hidden = torch.mul(leave, squashed, out=y[time])
    ends.copy_(cell)


def lstm_backward(
    dy: Tensor | None,
    dends: Tensor | None,
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    *,
    out: Sequence[Tensor],
) -> None:
    """Gradients of `lstm`, which made y, gates and cells. dy is like y, dends [N, H] the gradient of the cell state at
    the last time; None is zero.

    out: dx, d hidden, d cell, d w_ih, d w_hh, the gradient [4 H] of either bias, and scratch [T, N, 4 H], an output
    only so that the plan places it.
    """
    dx, dhidden, dcell, dw_ih, dw_hh, dbias, slopes = out
    with onednn(x.dtype):
        _slopes(dy, dends, cell, w_hh, gates, cells, dhidden, dcell, slopes, reverse=reverse)
        flat, inputs = slopes.view(-1, slopes.shape[-1]), x.view(-1, x.shape[-1])
        torch.mm(flat, w_ih, out=dx.view(inputs.shape))
        torch.mm(flat.t(), inputs, out=dw_ih)
        torch.mm(slopes[-1 if reverse else 0].t(), hidden, out=dw_hh)
        if len(x) > 1:
            later, earlier = (slopes[:-1], y[1:]) if reverse else (slopes[1:], y[:-1])
            dw_hh.addmm_(later.view(-1, flat.shape[1]).t(), earlier.view(-1, y.shape[-1]))
    torch.sum(flat, 0, out=dbias)


def _slopes(
    dy: Tensor | None,
    dends: Tensor | None,
    cell: Tensor,
    w_hh: Tensor,
    gates: Tensor,
    cells: Tensor,
    dhidden: Tensor,
    dcell: Tensor,
    slopes: Tensor,
    *,
    reverse: bool,
) -> None:
    """Fill `slopes` [T, N, 4 H], the gradient of the gates before their activations, and `dhidden` and `dcell`."""
    dcell.zero_() if dends is None else dcell.copy_(dends)
    dhidden.zero_()
    squashed, slope = torch.empty_like(cell), torch.empty_like(cell)
    for time, before in reversed(list(_times(len(gates), reverse=reverse))):
        enter, forget, new, leave = gates[time].chunk(4, 1)
        denter, dforget, dnew, dleave = slopes[time].chunk(4, 1)
        if dy is not None:
            dhidden.add_(dy[time])
        torch.tanh(cells[time], out=squashed)
        torch.mul(dhidden, squashed, out=dleave)
        torch.mul(dhidden, leave, out=slope)
        dcell.add_(aten.tanh_backward.grad_input(slope, squashed, grad_input=slope))
        torch.mul(dcell, new, out=denter)
        torch.mul(dcell, cell if before is None else cells[before], out=dforget)
        torch.mul(dcell, enter, out=dnew)
        dcell.mul_(forget)
        for gradient, activated in ((denter, enter), (dforget, forget), (dleave, leave)):
            aten.sigmoid_backward.grad_input(gradient, activated, grad_input=gradient)
        aten.tanh_backward.grad_input(dnew, new, grad_input=dnew)
        torch.mm(slopes[time], w_hh, out=dhidden)


def _times(count: int, *, reverse: bool) -> Iterator[tuple[int, int | None]]:
    """(time, the one before it), in the order in which the sequence is gone through."""
    before = None
    for time in range(count)[:: -1 if reverse else 1]:
        yield time, before
        before = time
