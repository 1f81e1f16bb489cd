"""Make the fused operators known to torch, with shapes for fake tensors and with their backward, for tracing.

Only the tracing process imports this; the runtime calls `profiles.operators` directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from profiles.operators import OPERATORS, STATE_COLUMNS, head_scratch

_library = torch.library.Library("tightfit", "DEF")


def _define(name: str, schema: str, shapes: Callable[..., Sequence[Tensor]]) -> Any:
    """One operator: `shapes` makes its empty outputs, for fake tensors and before the kernel fills them."""
    _library.define(f"{name}{schema}")
    single = schema.rstrip().endswith("-> Tensor")

    def fake(*args: Any) -> Any:
        outputs = shapes(*args)
        return outputs[0] if single else tuple(outputs)

    def kernel(*args: Any) -> Any:
        outputs = shapes(*args)
        OPERATORS[f"tightfit.{name}"](*args, out=outputs)
        return outputs[0] if single else tuple(outputs)

    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"tightfit::{name}", fake, lib=_library)
    return getattr(torch.ops.tightfit, name).default


def _same(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


rms_norm = _define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, bool unit_offset) -> (Tensor, Tensor)",
    lambda x, w, eps, o: (_same(x), x.new_empty((x.shape[0], 1), dtype=torch.float32)),
)
rms_norm_backward = _define(
    "rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool unit_offset) -> Tensor",
    lambda dy, x, w, r, o: (_same(x),),
)
attention = _define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? mask, int heads, int kv_heads, float scale) -> (Tensor, Tensor)",
    lambda q, k, v, cos, sin, mask, heads, kv, scale: (
        _same(q),
        q.new_empty((q.shape[0] // cos.shape[0], heads, cos.shape[0]), dtype=torch.float32),
    ),
)
attention_backward = _define(
    "attention_backward",
    "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor cos, Tensor sin, Tensor? mask,"
    " int heads, int kv_heads, float scale) -> (Tensor, Tensor, Tensor)",
    lambda dy, q, k, v, y, lse, cos, sin, mask, heads, kv, scale: (_same(q), _same(k), _same(v)),
)
gated = _define("gated", "(Tensor gate, Tensor up, str activation) -> Tensor", lambda g, u, a: (_same(g),))
gated_backward = _define(
    "gated_backward",
    "(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    lambda dy, g, u, a: (_same(g), _same(u)),
)
embed_rows = _define(
    "embed_rows",
    "(Tensor weight, Tensor ids, float scale) -> Tensor",
    lambda w, ids, s: (w.new_empty((ids.numel(), w.shape[1])),),
)
head_begin = _define(
    "head_begin",
    "(Tensor hidden) -> Tensor",
    lambda h: (h.new_empty((h.shape[0], STATE_COLUMNS + 2 * h.shape[1]), dtype=torch.float32),),
)
head_chunk = _define(
    "head_chunk",
    "(Tensor state, Tensor hidden, Tensor weight, Tensor labels, int start) -> (Tensor, Tensor, Tensor)",
    lambda s, h, w, y, a: (
        _same(s),
        w.new_empty((head_scratch(h.shape[0]), w.shape[0])),
        w.new_empty((head_scratch(h.shape[0]), w.shape[0]), dtype=torch.float32),
    ),
)
head_finish = _define(
    "head_finish",
    "(Tensor state, Tensor labels, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    lambda s, y, dtype: (
        s.new_empty(()),
        s.new_empty((s.shape[0],)),
        s.new_empty((s.shape[0], (s.shape[1] - STATE_COLUMNS) // 2), dtype=dtype),
    ),
)


def _rms_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, unit_offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.unit_offset = unit_offset
    ctx.mark_non_differentiable(output[1])


def _rms_grad(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, rstd = ctx.saved_tensors
    return rms_norm_backward(dy, x, weight, rstd, ctx.unit_offset), None, None, None


def _attention_setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, cos, sin, mask, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cos, sin, mask)
    ctx.mark_non_differentiable(output[1])


def _attention_grad(ctx: Any, dy: Tensor, _: Any) -> Any:
    return *attention_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None, None, None


def _gated_setup(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gated_grad(ctx: Any, dy: Tensor) -> Any:
    gate, up = ctx.saved_tensors
    return *gated_backward(dy, gate, up, ctx.activation), None


torch.library.register_autograd("tightfit::rms_norm", _rms_grad, setup_context=_rms_setup, lib=_library)
torch.library.register_autograd("tightfit::attention", _attention_grad, setup_context=_attention_setup, lib=_library)
torch.library.register_autograd("tightfit::gated", _gated_grad, setup_context=_gated_setup, lib=_library)

# The whole loss head is one differentiable operator for torch; a trace opens it into begin, one chunk per vocabulary
# slice, and finish (`open_head`), so that each slice is a weight of its own for the planner.
_library.define("head_loss(Tensor hidden, Tensor weight, Tensor labels, int slice_rows) -> (Tensor, Tensor, Tensor)")


def open_head(hidden: Tensor, weight: Tensor, labels: Tensor, slice_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    state = head_begin(hidden)
    for start in range(0, weight.shape[0], slice_rows):
        state, *_ = head_chunk(state, hidden, weight[start : start + slice_rows], labels, start)
    return head_finish(state, labels, hidden.dtype)  # type: ignore[no-any-return]


def _head_fake(hidden: Tensor, weight: Tensor, labels: Tensor, slice_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((hidden.shape[0],), dtype=torch.float32),
        hidden.new_empty(hidden.shape),
    )


def _head_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _head_grad(ctx: Any, dloss: Tensor, _: Any, __: Any) -> Any:
    # The loss is where backward starts: its gradient is one, and the product would be a pass over memory for nothing.
    return ctx.saved_tensors[0], None, None, None


_library.impl("head_loss", open_head, "CPU")
torch.library.register_fake("tightfit::head_loss", _head_fake, lib=_library)
torch.library.register_autograd("tightfit::head_loss", _head_grad, setup_context=_head_setup, lib=_library)
head_loss = torch.ops.tightfit.head_loss.default
DECOMPOSITIONS = {head_loss: open_head}
