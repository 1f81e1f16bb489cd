"""Warms a training process up: runs each kernel that a step needs once, then releases the memory of everything else."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.attention import attention_scratch
from tightfit.runtime.engine.cpu.cpu import KERNELS
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.cpu.products import narrow
from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.spill import SpillFile
from tightfit.runtime.engine.kernels.compiled import compile_operator
from tightfit.runtime.engine.kernels.optimizer import AdamW, GradientUpdate, MeZO, Perturbation
from tightfit.runtime.engine.start import lean_torch, page_out
from tightfit.runtime.engine.start.process import (
    narrow_file_mappings,
    release_file_pages,
    split_file_mappings,
    trim_heap,
)
from tightfit.runtime.engine.weights.store import Entry, unpack

aten = torch.ops.aten
SIZE = 256
DTYPES = (torch.bfloat16, torch.float32)


def prepare() -> TransferChannel:
    """Start the threads, run the kernels, and release what only the start needed; call it before loading anything
    large.

    Returns the channel for transfers. If the lean PyTorch fails here, the process starts again with a plain import.
    """
    torch._C._set_grad_enabled(False)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    channel = TransferChannel()
    try:
        split_file_mappings()
        for dtype in DTYPES:
            warm_up(channel, SIZE, (dtype,))
            narrow_file_mappings()
            release_file_pages()
    except Exception as error:
        if lean_torch.mode() == "plain":
            raise
        lean_torch.restart_plain(error)
    settle()
    return channel


def settle() -> None:
    """Release free heap pages and clean file pages (libraries, moved memory), and switch automatic garbage collection
    off.

    Objects that exist now are exempt from later collections (`gc.freeze`).
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    trim_heap()
    release_file_pages()
    page_out.release()


def tidy() -> None:
    """Collect garbage and release free heap pages between steps, so that each step starts from the same heap (1 to 2
    ms).
    """
    gc.collect()
    trim_heap()


def warm_up(
    channel: TransferChannel, size: int, dtypes: Sequence[torch.dtype] = DTYPES, *, backward: bool = True
) -> None:
    """Run what a step runs, on tensors of `size` (a multiple of 64) rows and columns.

    This maps the code, builds kernels and starts threads. Without `backward`, only what a step without a backward runs.
    """
    for dtype in dtypes:
        _forward(size, dtype)
        if backward:
            _backward(size, dtype)
    window = {"operand": {"value": "x", "size": [size, size], "stride": [size, 1]}}
    operator = {"target": "aten.mm.default", "args": [window, window], "outputs": ["x"]}
    compile_operator(operator, {"x": {}}, KERNELS).run({"x": torch.zeros(size, size)}, [torch.empty(size, size)])
    if backward:
        update = GradientUpdate(AdamW(), accumulate=2)
        for step in (1, 2):
            update.begin(step)
            update.apply(step, *(torch.full((4096,), 0.1) for _ in range(5)))
    Perturbation(MeZO(), 0).shift("p", torch.zeros(4096), 1)
    spill = SpillFile(tempfile.gettempdir(), 1 << 20)
    data = torch.zeros(1 << 18)
    channel.wait(channel.submit(spill.write, data.data_ptr(), 1 << 20, 0))
    channel.wait(channel.submit(spill.read, data.data_ptr(), 1 << 20, 0))
    spill.close()


def _forward(size: int, dtype: torch.dtype) -> None:
    x, w, y = (torch.randn(size, size).to(dtype) for _ in range(3))
    if narrow(dtype):
        # One product only: oneDNN keeps more than half a megabyte of code for each shape, and the model has
        # other shapes.
        aten.mm.out(x, w.t(), out=y)
    else:
        low = torch.empty(size, 8, dtype=dtype)
        OPERATORS["tightfit.lora_down"](x, torch.zeros(8, size), out=(low,))
        for bias in (None, torch.ones(size)):
            OPERATORS["tightfit.projection"](x, w, bias, low, torch.zeros(size, 8), 2.0, out=(y,))
    OPERATORS["tightfit.rms_norm"](x, torch.ones(size), 1e-5, False, out=(y, torch.empty(size, 1)))
    heads, turn, sums = size // 64, torch.ones(64, 32), torch.empty(size // 64, size // 64, 64)
    scratch = torch.empty(attention_scratch(size, 64, heads, size, size))
    OPERATORS["tightfit.attention"](x, x, x, turn, turn, None, None, heads, heads, 0.125, out=(y, sums, scratch))
    OPERATORS["tightfit.gated"](x, w, "silu", out=(y,))
    aten.add.out(x, w, out=y)
    aten.mul.Scalar(x, 2.0)
    y.copy_(x.float())
    _head(x, w, gradient=False)
    entry = Entry(name="w", shape=(size, size), format="q4", group=32)
    unpack(entry, torch.zeros(entry.bytes, dtype=torch.uint8), y)


def _backward(size: int, dtype: torch.dtype) -> None:
    x, w, y = (torch.randn(size, size).to(dtype) for _ in range(3))
    y2, rstd = torch.empty_like(x), torch.empty(size, 1)
    OPERATORS["tightfit.rms_norm"](x, torch.ones(size), 1e-5, False, out=(y2, rstd))
    OPERATORS["tightfit.rms_norm_backward"](x, x, torch.ones(size), rstd, False, out=(y2,))
    if not narrow(dtype):
        a, b, low = torch.zeros(8, size), torch.zeros(size, 8), torch.zeros(size, 8, dtype=dtype)
        OPERATORS["tightfit.lora_backward"](y, x, low, b, 2.0, out=(torch.empty_like(low), a, b))
        OPERATORS["tightfit.projection_backward"](y, w, low, a, x, out=(y2,))
    heads, turn, sums = size // 64, torch.ones(64, 32), torch.zeros(size // 64, size // 64, 64)
    scratch = torch.empty(attention_scratch(size, 64, heads, size, size, backward=True))
    OPERATORS["tightfit.attention_backward"](
        x, x, x, x, x, sums, turn, turn, None, None, heads, heads, 0.125, out=(y2, y2, y2, scratch)
    )
    OPERATORS["tightfit.gated_backward"](x, x, w, "silu", out=(y2, torch.empty_like(x)))
    _head(x, w, gradient=True)


def _head(x: Tensor, w: Tensor, *, gradient: bool) -> None:
    size = x.shape[0]
    labels = torch.zeros(1, size, dtype=torch.int64)
    state, next_state = (torch.empty(size, 3 + size * gradient) for _ in range(2))
    OPERATORS["tightfit.head_begin"](x, gradient, out=(state,))
    scratch = torch.empty_like(x), torch.empty(size, size)
    OPERATORS["tightfit.head_chunk"](state, x, w, labels, 0, out=(next_state, *scratch))
    losses = torch.empty(()), torch.empty(size)
    if gradient:
        OPERATORS["tightfit.head_finish"](next_state, x, labels, out=(*losses, torch.empty_like(x)))
    else:
        OPERATORS["tightfit.head_mean"](next_state, labels, out=losses)
