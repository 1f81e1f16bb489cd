"""PyTorch's operators on the CPU that write straight into the tensors that they are given where its own out variants would copy,
and its products of float32 by oneDNN where that is faster: `DIRECT[target](*args, out=(...), **kwargs)`.

Many of PyTorch's kernels only make new tensors: the result then lies in memory twice until it is copied. Here a convolution of one
point is the matrix product that it is, of each sample. What a function cannot do in place it has PyTorch do, and copies.

Outputs that nothing reads are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import onednn

aten = torch.ops.aten

LEAST_POINTS = 128
"""points of a sample's image from which on a convolution of one point is made of products of single samples"""
Outputs = Sequence[Tensor | None]


def relu(x: Tensor, *, out: Sequence[Tensor]) -> None:
    """PyTorch's kernel of relu, under the name under which it writes into a given tensor."""
    aten.clamp_min.out(x, 0, out=out[0])


def mm(left: Tensor, right: Tensor, *, out: Sequence[Tensor]) -> None:
    with onednn(left.dtype):
        aten.mm.out(left, right, out=out[0])


def addmm(
    addend: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1, out: Sequence[Tensor]
) -> None:
    with onednn(left.dtype):
        aten.addmm.out(addend, left, right, beta=beta, alpha=alpha, out=out[0])


def bmm(left: Tensor, right: Tensor, *, out: Sequence[Tensor]) -> None:
    with onednn(left.dtype):
        aten.bmm.out(left, right, out=out[0])


def baddbmm(
    addend: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1, out: Sequence[Tensor]
) -> None:
    with onednn(left.dtype):
        aten.baddbmm.out(addend, left, right, beta=beta, alpha=alpha, out=out[0])


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int, *, out: Sequence[Tensor],
) -> None:  # fmt: skip
    """x [N, I, ...], weight [O, I / groups, ...]; out [N, O, ...]."""
    (y,) = out
    if not _of_points(x, weight, y, stride, padding, transposed=transposed, groups=groups):
        y.copy_(
            aten.convolution.default(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        )
        return
    kernel = weight.view(weight.shape[:2])
    with onednn(x.dtype):
        for image, made in zip(x.flatten(2), y.flatten(2), strict=True):
            if bias is None:
                torch.mm(kernel, image, out=made)
            else:
                torch.addmm(bias.unsqueeze(1), kernel, image, out=made)


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int, wanted: Sequence[bool], *,
    out: Outputs,
) -> None:  # fmt: skip
    """out: d x, d weight, d bias [O] of `convolution`, those that are wanted."""
    if not _of_points(x, weight, dy, stride, padding, transposed=transposed, groups=groups) or (
        out[1] is not None and not out[1].is_contiguous()
    ):
        made = aten.convolution_backward.default(
            dy, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted
        )
        for output, one in zip(out, made, strict=True):
            if output is not None:
                output.copy_(one)
        return
    dx, dweight, dbias = out
    kernel = weight.view(weight.shape[:2])
    with onednn(x.dtype):
        for number, (image, slope) in enumerate(zip(x.flatten(2), dy.flatten(2), strict=True)):
            if dx is not None:
                torch.mm(kernel.t(), slope, out=dx[number].flatten(1))
            if dweight is not None:
                total = dweight.view(kernel.shape)
                torch.addmm(total, slope, image.t(), beta=1 if number else 0, out=total)
    if dbias is not None:
        torch.sum(dy, [place for place in range(dy.dim()) if place != 1], out=dbias)


def _of_points(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    transposed: bool,
    groups: int,
) -> bool:
    """Whether a convolution is a matrix product of each sample, as large as pays, of tensors that lie side by side."""
    return (
        groups == 1
        and not transposed
        and not any(padding)
        and all(step == 1 for step in stride)
        and all(size == 1 for size in weight.shape[2:])
        and x.dtype is torch.float32
        and x[0, 0].numel() >= LEAST_POINTS
        and x.is_contiguous()
        and y.is_contiguous()
        and weight.is_contiguous()
    )


DIRECT: dict[str, Callable[..., None]] = {
    "aten.relu.default": relu,
    "aten.mm.default": mm,
    "aten.addmm.default": addmm,
    "aten.bmm.default": bmm,
    "aten.baddbmm.default": baddbmm,
    "aten.convolution.default": convolution,
    "aten.convolution_backward.default": convolution_backward,
}
"""by target; `Kernels.direct`"""
