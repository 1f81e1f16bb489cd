"""Matrix products of the fused operators: in the tensors' own type where the processor multiplies it, otherwise in
float32.

On processors without instructions for bfloat16, PyTorch's products of such tensors take five to 170 times as long as
float32's (on two Zen 3 cores 256 x 896 x 4864 took 119 ms forward and 2.6 s backward; in float32 26 and 15 ms). There
operands are converted to float32 a block at a time, multiplied, and the result rounded once: about the speed of float32
in the memory of bfloat16. (Not measured: processors with AVX-512 and without its bfloat16.)

Also imported by the budgeted process, which runs these.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from tightfit.runtime.common.processor import NARROW, UNUSED_BY_MKL
from tightfit.runtime.engine.cpu.pages import make_pages

aten = torch.ops.aten

WIDE_ELEMENTS = 1 << 19  # most float32 elements of a block, of either operand or of the product: 2 MiB
SUMMED_ROWS = 256  # of a product that is added to a wider sum
Term = tuple[Tensor, Tensor, float]
"""(left [M, K], right [K, N], scale): scale * left @ right"""


def narrow(dtype: torch.dtype) -> bool:
    """Whether tensors of this type are multiplied in it here: float32, and bfloat16 if the processor has
    instructions.
    """
    return dtype is torch.float32 or NARROW


def multiply(*terms: Term, out: Tensor, addend: Tensor | None = None) -> None:
    """out [M, N] = the sum of the terms (+ addend [M, N] or [N]).

    If the product is made in the tensors' own type, an `addend` of that type requires `out` to be contiguous and of the
    type of the first term's left side; to an addend of another type, which may be `out` itself, the rounded product is
    added.
    """
    total = out if addend is None else addend
    if not (narrow(terms[0][0].dtype) and narrow(terms[0][1].dtype)):
        multiply_wide(*terms, out=out, addend=addend)
    elif total.dim() == 2 and total.dtype is not terms[0][0].dtype:
        _multiply_into_sum(terms, out, addend)
    else:
        _multiply_narrow(terms, out, addend)


def _multiply_into_sum(terms: tuple[Term, ...], out: Tensor, addend: Tensor | None) -> None:
    """The product, made a block of rows at a time in the type of the first term's left side, where the sum has another
    type.
    """
    for rows in blocks(out.shape[0], SUMMED_ROWS):
        product = torch.empty(rows.stop - rows.start, out.shape[1], dtype=terms[0][0].dtype)
        _multiply_narrow(tuple((left[rows], right, scale) for left, right, scale in terms), product, None)
        if addend is None:
            out[rows].copy_(product)
        else:
            torch.add(addend[rows], product, out=out[rows])


def _multiply_narrow(terms: tuple[Term, ...], out: Tensor, addend: Tensor | None) -> None:
    (left, right, scale), *others = (_rounded(term) for term in terms)
    product = out
    if addend is not None:
        aten.addmm.out(addend.to(left.dtype), left, right, alpha=scale, out=out)
    elif out.dtype is left.dtype and out.is_contiguous():
        torch.mm(left, right, out=out)
    else:
        product = torch.mm(left, right)
    if addend is None and scale != 1.0:
        product.mul_(scale)
    for left, right, scale in others:
        product.addmm_(left, right, alpha=scale)
    if product is not out:
        out.copy_(product)


def _rounded(term: Term) -> Term:
    """The term with its right side converted to the left side's type; unchanged if it has that type already.

    A right side of another type is a factor of a LoRA pair. Its longer dimension is made the contiguous one, and a
    scale that is a power of two, for which that is exact, is multiplied into it. oneDNN generates code for each
    combination of shape, layout and scale, and keeps it, more than half a megabyte each: in this form both factors of a
    pair, forward and backward, share theirs.
    """
    left, right, scale = term
    if right.dtype is left.dtype:
        return term
    tall = right.shape[0] > right.shape[1]
    rounded = (right.t() if tall else right).to(left.dtype, memory_format=torch.contiguous_format)
    if scale != 1.0 and math.frexp(scale)[0] == 0.5:
        rounded, scale = rounded.mul_(scale), 1.0
    return left, rounded.t() if tall else rounded, scale


@contextlib.contextmanager
def onednn(dtype: torch.dtype) -> Iterator[None]:
    """While entered, oneDNN makes PyTorch's float32 products, if that is faster and as exact as `dtype` asks for.

    `dtype` is the type of the tensors that the float32 operands were converted from. oneDNN may then round operands to
    bfloat16, which it does where that is faster: with AMX, not without. So for bfloat16 it is used wherever this
    processor multiplies that, for float32 only without AMX, and where MKL leaves AVX-512 unused. (On Zen 5 errors are
    1e-6, at twice the speed of MKL; on Zen 4, which takes AVX-512 in two halves, products of transposed operands take a
    quarter less.) The setting is global to the process, so only one thread may be in such a block at a time.
    """
    if not (NARROW if dtype is torch.bfloat16 else UNUSED_BY_MKL and dtype is torch.float32):
        yield
        return
    before = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    # The setting `torch.backends.mkldnn.matmul.fp32_precision`; the lean process does not have that module.
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16")
    try:
        yield
    finally:
        torch._C._set_fp32_precision_setter("mkldnn", "matmul", before)


def multiply_wide(*terms: Term, out: Tensor, addend: Tensor | None = None) -> None:
    """Like `multiply`, but computed in float32 on any processor and rounded once if `out` is narrower."""
    rows, columns = out.shape
    row_step, column_step, inner_step = _steps(rows, terms[0][0].shape[1], columns)
    operands = [(_WideOperand(f"left {number}"), _WideOperand(f"right {number}")) for number in range(len(terms))]
    for r in blocks(rows, row_step):
        for c in blocks(columns, column_step):
            shape = r.stop - r.start, c.stop - c.start
            total = _buffers.buffer("sum", shape[0] * shape[1]).view(shape)
            if not terms[0][0].shape[1]:
                total.zero_()
            for number, (left, right, scale) in enumerate(terms):
                for k in blocks(left.shape[1], inner_step):
                    # There is only one block of columns or one of inner elements; so each left block is converted once.
                    a = operands[number][0].block(left, r, k)
                    b = operands[number][1].block(right, k, c)
                    if number or k.start:
                        total.addmm_(a, b, alpha=scale)
                    else:
                        torch.mm(a, b, out=total)
                        if scale != 1.0:
                            total.mul_(scale)
            if addend is not None:
                total.add_(addend[c] if addend.dim() == 1 else addend[r, c])
            out[r, c].copy_(total)


class _Buffers(threading.local):
    """Buffers for blocks, one set per thread and reused by every product: new ones from the heap would leave holes
    there.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, elements: int) -> Tensor:
        """The first `elements` of the buffer `name`, float32."""
        if elements > WIDE_ELEMENTS:
            return torch.empty(elements, dtype=torch.float32)
        if name not in self.buffers or self.buffers[name].numel() < elements:
            self.buffers[name] = torch.frombuffer(make_pages(4 * WIDE_ELEMENTS), dtype=torch.float32)
        return self.buffers[name][:elements]


_buffers = _Buffers()


class _WideOperand:
    """Converts an operand to float32 block by block, and keeps the latest block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.converted: tuple[slice, slice] | None = None
        self.tensor: Tensor

    def block(self, tensor: Tensor, rows: slice, columns: slice) -> Tensor:
        """The block of these rows and columns in float32, with the memory order (rows or columns first) of `tensor`."""
        if self.converted != (rows, columns):
            self.converted, self.tensor = (rows, columns), tensor[rows, columns]
            if tensor.dtype is not torch.float32:
                columns_first = self.tensor.stride(0) < self.tensor.stride(1)
                narrow = self.tensor.t() if columns_first else self.tensor
                wide = _buffers.buffer(self.name, narrow.numel()).view(narrow.shape).copy_(narrow)
                self.tensor = wide.t() if columns_first else wide
        return self.tensor


def _steps(rows: int, inner: int, columns: int) -> tuple[int, int, int]:
    """Rows, columns and inner elements per block. The shorter of columns and inner dimension is not divided."""
    inner, columns = max(1, inner), max(1, columns)
    whole = min(inner, columns)
    row_step = _even(rows, max(1, WIDE_ELEMENTS // whole))
    step = max(1, WIDE_ELEMENTS // max(whole, row_step))
    return (row_step, _even(columns, step), inner) if inner <= columns else (row_step, columns, _even(inner, step))


def _even(length: int, most: int) -> int:
    """The size of the blocks if `length` is divided into as few as possible, about equal ones of at most `most`."""
    return -(-length // -(-length // most)) if length > most else max(1, length)


def blocks(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` elements that together cover [0, `length`); the last may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))
