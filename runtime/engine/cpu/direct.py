"""PyTorch's operators on the CPU that write straight into the tensors that they are given where its own out variants would copy,
and its products of float32 by oneDNN where that is faster: `DIRECT[target](*args, out=(...), **kwargs)`.

Many of PyTorch's kernels only make new tensors: the result then lies in memory twice until it is copied. Here a convolution of one
point is the matrix product that it is, of each sample: a fifth faster on a core of Zen 4, and 2.5 times as fast for the gradient
with a stride. Other convolutions have PyTorch make the results of a few samples at a time, and copy them. Buffers stay small, so
that those of the next operator fit into the place that they leave.

Outputs that nothing reads are None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks, onednn

aten = torch.ops.aten

LEAST_POINTS = 128
"""points of a sample's result from which on a convolution of one point is made of products of single samples"""
PART_BYTES = 8 << 20
"""of samples that are convolved together: oneDNN takes up to three times these as workspace"""
WEIGHT_SHARE = 4
"""times that a part is larger than the weights, at least"""
NORM_ELEMENTS = 1 << 20
"""of a sample that a batch norm's gradient is made of at a time"""
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
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int, *, out: Sequence[Tensor],
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
        for image, made in zip(x, y.flatten(2), strict=True):
            points = _points(image, stride)
            if bias is None:
                torch.mm(kernel, points, out=made)
            else:
                torch.addmm(bias.unsqueeze(1), kernel, points, out=made)


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int, wanted: Sequence[bool], *,
    out: Outputs,
) -> None:  # fmt: skip
    """out: d x, d weight, d bias [O] of `convolution`, those that are wanted."""
    dx, dweight, dbias = out
    settings = stride, padding, dilation, transposed, output_padding, groups
    if (dweight is not None and not dweight.is_contiguous()) or not _of_points(x, weight, dy, *settings):
        for rows in _parts(x, weight, dy):
            made = aten.convolution_backward.default(dy[rows], x[rows], weight, bias_sizes, *settings, wanted)
            if dx is not None:
                dx[rows].copy_(made[0])
            for total, part in ((dweight, made[1]), (dbias, made[2])):
                if total is not None:
                    total.add_(part) if rows.start else total.copy_(part)
            del made, part  # before the next ones are made
        return
    kernel = weight.view(weight.shape[:2])
    with onednn(x.dtype):
        for number, (image, slope) in enumerate(zip(x, dy.flatten(2), strict=True)):
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
        and y[0, 0].numel() >= LEAST_POINTS
        and x.is_contiguous()
        and y.is_contiguous()
        and weight.is_contiguous()
    )


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
    """Samples that are convolved together: about `PART_BYTES` of them, or all where the weights, which are brought into another
    order for each part, are so large that this would take long.
    """
    sample = max(1, (x.nbytes + y.nbytes) // max(1, len(x)))
    count = max(1, PART_BYTES // sample)
    return blocks(len(x), count if count * sample >= WEIGHT_SHARE * weight.nbytes else max(1, len(x)))


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor | None,
    rstd: Tensor | None, train: bool, eps: float, wanted: Sequence[bool], *, out: Outputs,
) -> None:  # fmt: skip
    """out: d x, d weight [C], d bias [C] of a batch norm whose batch x [N, C, ...] had this mean and 1 / standard deviation.

    With n = (x - mean) * rstd: d bias = sum dy, d weight = sum dy * n, d x = weight * rstd * (dy - mean of dy - n * mean of dy * n).
    """
    dx, dweight, dbias = out
    tensors = [tensor for tensor in (x, dy, dx) if tensor is not None and tensor.is_contiguous()]
    if (
        (dx is None or dweight is None or dbias is None or mean is None or rstd is None)
        or not train
        or len(tensors) < 3
        or x.dtype is not torch.float32
        or x.nbytes < PART_BYTES
    ):
        made = aten.native_batch_norm_backward.default(
            dy, x, weight, running_mean, running_var, mean, rstd, train, eps, wanted
        )
        for output, one in zip(out, made, strict=True):
            if output is not None:
                output.copy_(one)
        return
    images, slopes, results = (tensor.flatten(2) for tensor in tensors)
    points = images.shape[2]
    parts = list(blocks(x.shape[1], max(1, NORM_ELEMENTS // points)))
    room = torch.empty(parts[0].stop, points)
    center = mean.unsqueeze(1)
    dweight.zero_()
    dbias.zero_()
    for part in parts:
        for image, slope in zip(images[:, part], slopes[:, part], strict=True):
            product = torch.sub(image, center[part], out=room[: len(image)]).mul_(slope)
            dweight[part].add_(product.sum(1))
            dbias[part].add_(slope.sum(1))
    dweight.mul_(rstd)
    scale = rstd if weight is None else rstd * weight
    count = -1 / (len(x) * points)
    scales, along, shift = (
        each.unsqueeze(1) for each in (scale, dweight * rstd * scale * count, dbias * scale * count)
    )
    for part in parts:
        for image, slope, result in zip(images[:, part], slopes[:, part], results[:, part], strict=True):
            torch.sub(image, center[part], out=result).mul_(along[part]).addcmul_(slope, scales[part]).add_(shift[part])


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
}
"""by target; `Kernels.direct`"""
