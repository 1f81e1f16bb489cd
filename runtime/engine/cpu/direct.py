"""PyTorch's operators on the CPU that write straight into the tensors that they are given where its own out variants
would copy, and its products of float32 by oneDNN where that is faster: `DIRECT[target](*args, out=(...), **kwargs)`.

Many of PyTorch's kernels only make new tensors: the result then lies in memory twice until it is copied. Here a
convolution of one point is the matrix product that it is, of each sample or, with channels last, of all of them: a
fifth faster on a core of Zen 4, and 2.5 times as fast for the gradient with a stride. Other convolutions have PyTorch
make the results of a few samples at a time, and copy them. Buffers stay small, so that those of the next operator fit
into the place that they leave.

Outputs that nothing reads are None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks, onednn

aten = torch.ops.aten

LEAST_POINTS = 128
"""points of a sample's result from which on a convolution of one point is made of products of single samples"""
PART_BYTES = 8 << 20
"""bytes of the samples that are convolved together; oneDNN takes up to three times as many as workspace"""
WEIGHT_SHARE = 4
"""least ratio of a part's bytes to those of the weights"""
IMAGES = 4
"""dimensions: samples, channels, height, width"""
Outputs = Sequence[Tensor | None]


def new_zeros(like: Tensor, size: Sequence[int], *, out: Sequence[Tensor], **_: object) -> None:
    out[0].zero_()


def copy(like: Tensor, x: Tensor, *, out: Sequence[Tensor], **_: object) -> None:
    """x in the shape, type and strides of `like`, which are those of out."""
    out[0].copy_(x)


def as_strided_scatter(
    x: Tensor, part: Tensor, size: Sequence[int], stride: Sequence[int], offset: int, *, out: Sequence[Tensor]
) -> None:
    """x with `part` in the place of the elements that size, stride and offset choose from its storage."""
    out[0].copy_(x)
    out[0].as_strided(size, stride, offset - x.storage_offset()).copy_(part)


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
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int, *, out: Sequence[Tensor],
) -> None:  # fmt: skip
    """x [N, I, ...], weight [O, I / groups, ...]; out [N, O, ...]."""
    (y,) = out
    settings = stride, padding, dilation, transposed, output_padding, groups
    if not _of_points(x, weight, y, *settings):
        for rows in _parts(x, weight, y):
            y[rows].copy_(aten.convolution.default(x[rows], weight, bias, *settings))
        return
    kernel = weight.view(weight.shape[:2])
    with onednn(x.dtype):
        if not (x.is_contiguous() and y.is_contiguous()):
            if bias is None:
                torch.mm(_rows(x, stride), kernel.t(), out=_rows(y))
            else:
                torch.addmm(bias, _rows(x, stride), kernel.t(), out=_rows(y))
            return
        for image, result in zip(x, y.flatten(2), strict=True):
            points = _points(image, stride)
            if bias is None:
                torch.mm(kernel, points, out=result)
            else:
                torch.addmm(bias.unsqueeze(1), kernel, points, out=result)


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int, wanted: Sequence[bool], *,
    out: Outputs,
) -> None:  # fmt: skip
    """out: d x, d weight, d bias [O] of `convolution`, those that are wanted."""
    dx, dweight, dbias = out
    settings = stride, padding, dilation, transposed, output_padding, groups
    in_place = (dx is None or dx.stride() == x.stride()) and (dweight is None or dweight.is_contiguous())
    if not in_place or not _of_points(x, weight, dy, *settings):
        for rows in _parts(x, weight, dy):
            gradients = aten.convolution_backward.default(dy[rows], x[rows], weight, bias_sizes, *settings, wanted)
            if dx is not None:
                dx[rows].copy_(gradients[0])
            for total, part in ((dweight, gradients[1]), (dbias, gradients[2])):
                if total is not None:
                    total.add_(part) if rows.start else total.copy_(part)
            del gradients, part  # before the next ones are made
        return
    kernel = weight.view(weight.shape[:2])
    with onednn(x.dtype):
        planes = x.is_contiguous() and dy.is_contiguous()
        if not planes:
            slopes = _rows(dy)
            if dx is not None and all(step == 1 for step in stride):
                torch.mm(slopes, kernel, out=_rows(dx))
            elif dx is not None:
                read = dx.zero_()[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
                read.copy_(torch.mm(slopes, kernel).view(read.shape))
            if dweight is not None:
                torch.mm(slopes.t(), _rows(x, stride), out=dweight.view(kernel.shape))
        for number, (image, slope) in enumerate(zip(x, dy.flatten(2), strict=True) if planes else ()):
            if dx is not None:
                _back_to_points(kernel, slope, dx[number], stride)
            if dweight is not None:
                total = dweight.view(kernel.shape)
                torch.addmm(total, slope, _points(image, stride).t(), beta=1 if number else 0, out=total)
    if dbias is not None:
        torch.sum(dy, [place for place in range(dy.dim()) if place != 1], out=dbias)


def _of_points(
    x: Tensor, weight: Tensor, y: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int,
) -> bool:  # fmt: skip
    """Whether a convolution is a matrix product of each sample, as large as pays, of tensors that lie side by side."""
    return (
        groups == 1
        and not transposed
        and not any(padding)
        and all(size == 1 for size in weight.shape[2:])
        and len(stride) == x.dim() - 2
        and x.dtype is torch.float32
        and weight.is_contiguous()
        and (
            (y[0, 0].numel() >= LEAST_POINTS and x.is_contiguous() and y.is_contiguous())
            or (_channels_last(x) and _channels_last(y))
        )
    )


def _channels_last(images: Tensor) -> bool:
    return images.dim() == IMAGES and images.is_contiguous(memory_format=torch.channels_last)


def _rows(images: Tensor, stride: Sequence[int] = (1, 1)) -> Tensor:
    """The points of images with channels last that a convolution reads, [points, channels]; a copy where it leaves some
    out.
    """
    return images[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _points(image: Tensor, stride: Sequence[int]) -> Tensor:
    """The points of an image [I, ...] that a convolution reads, [I, points]; a copy where it leaves some out."""
    read = image[(slice(None), *(slice(None, None, step) for step in stride))]
    return read.reshape(len(image), -1)


def _back_to_points(kernel: Tensor, slope: Tensor, out: Tensor, stride: Sequence[int]) -> None:
    """Gradient [I, ...] of an image, from that of the result [O, points]; zero for points that were left out."""
    if all(step == 1 for step in stride):
        torch.mm(kernel.t(), slope, out=out.flatten(1))
        return
    read = out.zero_()[(slice(None), *(slice(None, None, step) for step in stride))]
    read.copy_(torch.mm(kernel.t(), slope).view(read.shape))


def _parts(x: Tensor, weight: Tensor, y: Tensor) -> Iterator[slice]:
    """Samples that are convolved together: about `PART_BYTES` of them, or all where the weights, which are brought into
    another order for each part, are so large that this would take long.
    """
    sample = max(1, (x.nbytes + y.nbytes) // max(1, len(x)))
    count = max(1, PART_BYTES // sample)
    return blocks(len(x), count if count * sample >= WEIGHT_SHARE * weight.nbytes else max(1, len(x)))


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, train: bool, eps: float, wanted: Sequence[bool], *, out: Outputs,
) -> None:  # fmt: skip
    """out: d x, d weight [C], d bias [C] of a batch norm whose batch x [N, C, ...] had this mean and 1 / standard
    deviation.

    With n = (x - mean) * rstd: d bias = sum dy, d weight = sum dy * n, d x = weight * rstd * (dy - mean of dy - n *
    mean of dy * n).
    """
    dx, dweight, dbias = out
    arguments = dy, x, weight, running_mean, running_var, mean, rstd, train, eps
    if (
        (dx is None or dweight is None or dbias is None or mean is None or rstd is None)
        or not train
        or x.dtype is not torch.float32
        or x.nbytes < PART_BYTES
    ):
        gradients = aten.native_batch_norm_backward.default(*arguments, wanted)
        for output, gradient in zip(out, gradients, strict=True):
            if output is not None:
                output.copy_(gradient)
        return
    _, *sums = aten.native_batch_norm_backward.default(*arguments, [False, True, True])
    dweight.copy_(sums[0])
    dbias.copy_(sums[1])
    scale = rstd if weight is None else rstd * weight
    count = -x.shape[1] / x.numel()
    center, scales, along, shift = (
        each.view(-1, *[1] * (x.dim() - 2))
        for each in (mean, scale, dweight * rstd * scale * count, dbias * scale * count)
    )
    for image, slope, result in zip(x, dy, dx, strict=True):
        torch.addcmul(shift, torch.sub(image, center, out=result), along, out=result).addcmul_(slope, scales)


def max_pool2d_backward(
    dy: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, indices: Tensor, *, out: Sequence[Tensor],
) -> None:  # fmt: skip
    """PyTorch reads only x's shape and order in memory, which the result takes; so another tensor may stand in for
    x.
    """
    (dx,) = out
    aten.max_pool2d_with_indices_backward.grad_input(
        dy, dx, kernel, stride, padding, dilation, ceil_mode, indices, grad_input=dx
    )


def avg_pool2d_backward(dy: Tensor, x: Tensor, *settings: Any, out: Sequence[Tensor]) -> None:
    """As `max_pool2d_backward`."""
    aten.avg_pool2d_backward.grad_input(dy, out[0], *settings, grad_input=out[0])


DIRECT: dict[str, Callable[..., None]] = {
    "aten.new_zeros.default": new_zeros,
    "aten.copy.default": copy,
    "aten.as_strided_scatter.default": as_strided_scatter,
    "aten.relu.default": relu,
    "aten.mm.default": mm,
    "aten.addmm.default": addmm,
    "aten.bmm.default": bmm,
    "aten.baddbmm.default": baddbmm,
    "aten.convolution.default": convolution,
    "aten.convolution_backward.default": convolution_backward,
    "aten.native_batch_norm_backward.default": batch_norm_backward,
    "aten.max_pool2d_with_indices_backward.default": max_pool2d_backward,
    "aten.avg_pool2d_backward.default": avg_pool2d_backward,
}
"""the functions by target, for `Kernels.direct`"""
