"""Registers tightfit's fused operators with torch for tracing, with shapes for fake tensors, backwards and FLOPs.

Only the process that traces imports this; the runtime calls `tightfit.runtime.engine.cpu.operators` directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.runtime.common.processor import NARROW
from tightfit.runtime.engine.cpu.attention import attention_scratch
from tightfit.runtime.engine.cpu.operators import OPERATORS, STATE_COLUMNS
from tightfit.runtime.engine.cpu.tables import head_scratch

_library = torch.library.Library("tightfit", "DEF")


def _define(name: str, schema: str, shapes: Callable[..., Sequence[Tensor]]) -> Any:
    """Register one operator. `shapes` makes its empty outputs, which fake tensors use and the kernel fills."""
    _library.define(f"{name}{schema}")
    single = schema.rstrip().endswith("-> Tensor")

    def fake(*args: Any) -> Any:
        outputs = shapes(*args)
        return outputs[0] if single else tuple(outputs)

    def kernel(*args: Any) -> Any:
        outputs = shapes(*args)
        OPERATORS[f"tightfit.{name}"](*args, out=outputs)
        return outputs[0] if single else tuple(outputs)

    return _registered(name, kernel, fake)


def _registered(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register the kernel of an operator that is defined, and how fake tensors take it; returns the operator."""
    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"tightfit::{name}", fake, lib=_library)
    return getattr(torch.ops.tightfit, name).default


def _differentiable(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Callable[..., Any],
    setup: Callable[..., None],
) -> Any:
    """`_registered`, with the gradient that autograd takes."""
    operator = _registered(name, kernel, fake)
    torch.library.register_autograd(f"tightfit::{name}", gradient, setup_context=setup, lib=_library)
    return operator


def _same(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _attention_scratch(q: Tensor, k: Tensor, cos: Tensor, heads: int, *, backward: bool) -> Tensor:
    size = attention_scratch(q.shape[0], cos.shape[0], heads, q.shape[1], k.shape[1], backward=backward)
    return q.new_empty(size, dtype=torch.float32)


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
lora_down = _define(
    "lora_down", "(Tensor x, Tensor a) -> Tensor", lambda x, a: (x.new_empty((x.shape[0], a.shape[0])),)
)
projection = _define(
    "projection",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? low, Tensor? b, float scale) -> Tensor",
    lambda x, w, bias, low, b, s: (x.new_empty((x.shape[0], w.shape[0])),),
)
lora_backward = _define(
    "lora_backward",
    "(Tensor dy, Tensor x, Tensor low, Tensor b, float scale) -> (Tensor, Tensor, Tensor)",
    lambda dy, x, low, b, s: (_same(low), b.new_empty((low.shape[1], x.shape[1])), _same(b)),
)
projection_backward = _define(
    "projection_backward",
    "(Tensor dy, Tensor weight, Tensor? dlow, Tensor? a, Tensor? addend, ScalarType? dtype=None) -> Tensor",
    lambda dy, w, dlow, a, addend, dtype=None: (dy.new_empty((dy.shape[0], w.shape[1]), dtype=dtype or dy.dtype),),
)
attention = _define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? mask, Tensor? positions, int heads, int kv_heads,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    lambda q, k, v, cos, sin, mask, positions, heads, kv, scale: (
        _same(q),
        q.new_empty((q.shape[0] // cos.shape[0], heads, cos.shape[0]), dtype=torch.float32),
        _attention_scratch(q, k, cos, heads, backward=False),
    ),
)
attention_backward = _define(
    "attention_backward",
    "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor cos, Tensor sin, Tensor? mask,"
    " Tensor? positions, int heads, int kv_heads, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, q, k, v, y, lse, cos, sin, mask, positions, heads, kv, scale: (
        *map(_same, (q, k, v)),
        _attention_scratch(q, k, cos, heads, backward=True),
    ),
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
    lambda w, ids, s: (w.new_empty((ids.numel(), w.shape[1]), device=ids.device),),
)
head_rows = _define(
    "head_rows",
    "(Tensor weight, Tensor labels) -> Tensor",
    lambda w, labels: (w.new_empty((labels.numel(), w.shape[1])),),
)
head_begin = _define(
    "head_begin",
    "(Tensor hidden, bool gradient=True) -> Tensor",
    lambda h, gradient=True: (
        h.new_empty((h.shape[0], STATE_COLUMNS + (h.shape[1] if gradient else 0)), dtype=torch.float32),
    ),
)
head_chunk = _define(
    "head_chunk",
    "(Tensor state, Tensor hidden, Tensor weight, Tensor labels, int start, bool rounded) -> (Tensor, Tensor, Tensor)",
    lambda s, h, w, y, a, rounded: (
        _same(s),
        w.new_empty((head_scratch(h.shape[0]) if rounded else 1, w.shape[0])),
        w.new_empty((head_scratch(h.shape[0]), w.shape[0]), dtype=torch.float32),
    ),
)
head_finish = _define(
    "head_finish",
    "(Tensor state, Tensor rows, Tensor labels, Tensor? counted=None) -> (Tensor, Tensor, Tensor)",
    lambda s, rows, y, counted=None: (s.new_empty(()), s.new_empty((s.shape[0],)), _same(rows)),
)
head_mean = _define(
    "head_mean",
    "(Tensor state, Tensor labels, Tensor? counted=None) -> (Tensor, Tensor)",
    lambda s, y, counted=None: (s.new_empty(()), s.new_empty((s.shape[0],))),
)
head_weighted = _define(
    "head_weighted",
    "(Tensor state, Tensor rows, Tensor weights) -> Tensor",
    lambda s, rows, w: (_same(rows),),
)
preference_loss = _define(
    "preference_loss",
    "(Tensor token_losses, Tensor labels, Tensor known, str loss, float beta) -> (Tensor, Tensor)",
    lambda losses, labels, known, loss, beta: (losses.new_empty(()), _same(losses)),
)


Shape = Sequence[int]


@register_flop_formula([torch.ops.tightfit.lora_down])
def _down_flops(x: Shape, a: Shape, **_: Any) -> int:
    return 2 * x[0] * x[1] * a[0]


@register_flop_formula([torch.ops.tightfit.projection])
def _projection_flops(
    x: Shape, weight: Shape, bias: Shape | None, low: Shape | None, b: Shape | None, scale: float, **_: Any
) -> int:
    return 2 * x[0] * weight[0] * (x[1] + (low[1] if low else 0))


@register_flop_formula([torch.ops.tightfit.lora_backward])
def _lora_flops(dy: Shape, x: Shape, low: Shape, b: Shape, scale: float, **_: Any) -> int:
    return 2 * low[0] * low[1] * (2 * dy[1] + x[1])


@register_flop_formula([torch.ops.tightfit.projection_backward])
def _back_flops(
    dy: Shape, weight: Shape, dlow: Shape | None, a: Shape | None, addend: Shape | None, dtype: Any = None, **_: Any
) -> int:
    return 2 * dy[0] * weight[1] * (dy[1] + (dlow[1] if dlow else 0))


def _rms_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, unit_offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.unit_offset = unit_offset
    ctx.mark_non_differentiable(output[1])


def _rms_grad(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, rstd = ctx.saved_tensors
    return rms_norm_backward(dy, x, weight, rstd, ctx.unit_offset), None, None, None


def _attention_setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, cos, sin, mask, positions, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output[:2], cos, sin, mask, positions)
    ctx.mark_non_differentiable(*output[1:])


def _attention_grad(ctx: Any, dy: Tensor, _: Any, __: Any) -> Any:
    dq, dk, dv, _ = attention_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.rest)
    return dq, dk, dv, None, None, None, None, None, None, None


def _preference_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _preference_grad(ctx: Any, dloss: Tensor, _: Any) -> Any:
    return ctx.saved_tensors[0], None, None, None, None  # dloss is 1, as in `_head_grad`


def _gated_setup(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gated_grad(ctx: Any, dy: Tensor) -> Any:
    gate, up = ctx.saved_tensors
    return *gated_backward(dy, gate, up, ctx.activation), None


torch.library.register_autograd("tightfit::rms_norm", _rms_grad, setup_context=_rms_setup, lib=_library)
torch.library.register_autograd("tightfit::attention", _attention_grad, setup_context=_attention_setup, lib=_library)
torch.library.register_autograd("tightfit::gated", _gated_grad, setup_context=_gated_setup, lib=_library)
torch.library.register_autograd(
    "tightfit::preference_loss", _preference_grad, setup_context=_preference_setup, lib=_library
)


def loss_of_tokens(
    token_losses: Tensor, labels: Tensor, known: Tensor | None = None, loss: str = "", beta: float = 0.0
) -> Tensor:
    """The loss of a batch as a function of its token losses: their mean over the labelled tokens, or the loss of
    pairs.
    """
    if known is None:
        return token_losses.sum() / (labels.reshape(-1) >= 0).sum().clamp(min=1)
    return preference_loss(token_losses, labels, known, loss, beta)[0]  # type: ignore[no-any-return]


# A projection with its LoRA pair is one differentiable operator for torch. A trace decomposes it, so that the narrow
# LoRA product can be recomputed without the wide one, and a layer whose input needs no gradient skips
# `projection_backward`. Of a matrix with more than `slice_rows` rows each slice of so many is a weight of its own.
_library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, int slice_rows)"
    " -> (Tensor, Tensor)"
)


def open_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, slice_rows: int
) -> tuple[Tensor, Tensor]:
    low = lora_down(x, a)
    return projected(x, weight, bias, low, b, scale, slice_rows), low


def projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    scale: float,
    slice_rows: int,
) -> Tensor:
    """`projection`, of each slice of the weight's rows by itself."""
    parts = []
    for rows in row_slices(weight, slice_rows):
        own = [None if tensor is None else tensor[rows] for tensor in (bias, b)]
        parts.append(projection(x, weight[rows], own[0], low, own[1], scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def projected_backward(dy: Tensor, weight: Tensor, dlow: Tensor | None, a: Tensor | None, slice_rows: int) -> Tensor:
    """`projection_backward`, of each slice of the weight's rows by itself, from the first to the last: what they
    contribute is summed in float32 and rounded once.
    """
    slices = row_slices(weight, slice_rows)
    dx = None
    for number, rows in enumerate(slices):
        last = number == len(slices) - 1
        pair = (dlow, a) if last else (None, None)
        columns = dy if len(slices) == 1 else dy[:, rows]
        dx = projection_backward(columns, weight[rows], *pair, dx, None if last else torch.float32)
    assert dx is not None
    return dx  # type: ignore[no-any-return]


def row_slices(weight: Tensor, slice_rows: int) -> list[slice]:
    """The slices of so many rows of a matrix, the last of as many as are left; all rows at once where there are no
    more.
    """
    return [slice(start, start + slice_rows) for start in range(0, weight.shape[0], slice_rows)]


def _lora_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, slice_rows: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], a.shape[0]))


def _lora_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, a, b, ctx.scale, ctx.slice_rows = inputs
    ctx.save_for_backward(x, weight, a, b, output[1])
    ctx.mark_non_differentiable(output[1])


def _lora_grad(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, a, b, low = ctx.saved_tensors
    dlow, da, db = lora_backward(dy, x, low, b, ctx.scale)
    dx = projected_backward(dy, weight, dlow, a, ctx.slice_rows) if ctx.needs_input_grad[0] else None
    return dx, None, None, da, db, None, None


lora_linear = _differentiable("lora_linear", open_lora, _lora_fake, _lora_grad, _lora_setup)

# The same without a pair.
_library.define("frozen_linear(Tensor x, Tensor weight, Tensor? bias, int slice_rows) -> Tensor")


def open_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, slice_rows: int) -> Tensor:
    return projected(x, weight, bias, None, None, 0.0, slice_rows)


def _frozen_fake(x: Tensor, weight: Tensor, bias: Tensor | None, slice_rows: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _frozen_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.slice_rows = inputs[3]


def _frozen_grad(ctx: Any, dy: Tensor) -> Any:
    (weight,) = ctx.saved_tensors
    return projected_backward(dy, weight, None, None, ctx.slice_rows), None, None, None


frozen_linear = _differentiable("frozen_linear", open_frozen, _frozen_fake, _frozen_grad, _frozen_setup)

# The whole loss head is one differentiable operator for torch. A trace decomposes it into begin, one chunk per
# vocabulary slice, and finish (`open_head`), so that the planner sees each slice as a weight of its own. The weight
# rows of the labels are gathered like an embedding's: if every slice passed them on, they would be half of the state.
# `counted` are the labels of the whole batch of which `hidden` is a part: the mean is over these. With a `loss` it is
# that of pairs (`preference_loss`): what each token weighs in it is known once the state is complete.
PAIRS = 'Tensor? known=None, str loss="", float beta=0.0'
_library.define(
    f"head_loss(Tensor hidden, Tensor weight, Tensor labels, int slice_rows, {PAIRS}, Tensor? counted=None)"
    " -> (Tensor, Tensor, Tensor)"
)


def open_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    slice_rows: int,
    known: Tensor | None = None,
    loss: str = "",
    beta: float = 0.0,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    state = _fold_slices(head_begin(hidden), hidden, weight, labels, slice_rows)
    rows = head_rows(weight, labels)
    if known is None:
        return head_finish(state, rows, labels, *_given(counted))  # type: ignore[no-any-return]
    _, token_losses = head_mean(state, labels)
    value, weights = preference_loss(token_losses, labels, known, loss, beta)
    return value, token_losses, head_weighted(state, rows, weights)


def open_head_without_gradient(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    slice_rows: int,
    known: Tensor | None = None,
    loss: str = "",
    beta: float = 0.0,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    """The same losses as `open_head`, to the bit, with half the arithmetic, since no gradient is computed along with
    them.
    """
    state = _fold_slices(head_begin(hidden, False), hidden, weight, labels, slice_rows)
    value, token_losses = head_mean(state, labels, *_given(counted))
    if known is not None:
        value, _ = preference_loss(token_losses, labels, known, loss, beta)
    return value, token_losses, None


def _given(counted: Tensor | None) -> tuple[Tensor, ...]:
    return () if counted is None else (counted,)


def _fold_slices(state: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, slice_rows: int) -> Tensor:
    rounded = NARROW and weight.dtype is not torch.float32
    for start in range(0, weight.shape[0], slice_rows):
        state, *_ = head_chunk(state, hidden, weight[start : start + slice_rows], labels, start, rounded)
    return state


def _head_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((hidden.shape[0],), dtype=torch.float32),
        hidden.new_empty(hidden.shape),
    )


def _head_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _head_grad(ctx: Any, dloss: Tensor, _: Any, __: Any) -> Any:
    # Backward starts at the loss, so dloss is 1, and multiplying by it would be a useless pass over memory.
    return ctx.saved_tensors[0], *[None] * 7


head_loss = _differentiable("head_loss", open_head, _head_fake, _head_grad, _head_setup)

# The same head with capped logits, cap * tanh(logit / cap). It is decomposed into PyTorch's operators. The largest
# logit is known to be below the cap, so that softmax needs no running maximum.
MOST_CAP = 40.0
"""Largest cap at which exp(-2 * cap), the smallest term of softmax's sum, is a float32."""
_library.define(
    f"capped_head_loss(Tensor hidden, Tensor weight, Tensor labels, int slice_rows, float cap, {PAIRS})"
    " -> (Tensor, Tensor, Tensor)"
)


def open_capped_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, slice_rows: int, cap: float, *pairs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _capped_head(hidden, weight, labels, slice_rows, cap, *pairs, gradient=True)  # type: ignore[return-value]


def open_capped_head_without_gradient(
    hidden: Tensor, weight: Tensor, labels: Tensor, slice_rows: int, cap: float, *pairs: Any
) -> tuple[Tensor, Tensor, None]:
    """The same losses as `open_capped_head`, with half the arithmetic."""
    return *_capped_head(hidden, weight, labels, slice_rows, cap, *pairs, gradient=False)[:2], None


def _capped_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    slice_rows: int,
    cap: float,
    known: Tensor | None = None,
    loss: str = "",
    beta: float = 0.0,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """loss float32 [], token losses float32 [T], d loss / d hidden [T, H] of cap * tanh(hidden @ weight.T / cap)."""
    rows = head_rows(weight, labels)
    total = slopes = None
    for start in range(0, weight.shape[0], slice_rows):
        slice_weight = weight[start : start + slice_rows]
        share = torch.tanh(torch.mm(hidden, slice_weight.t()).float() / cap)
        terms = torch.exp((share - 1.0) * cap)
        slice_sum = terms.sum(1)
        total = slice_sum if total is None else total + slice_sum
        if gradient:
            slope = torch.mm((terms * (1.0 - share * share)).to(weight.dtype), slice_weight).float()
            slopes = slope if slopes is None else slopes + slope
    label_share = torch.tanh((hidden.float() * rows.float()).sum(1) / cap)
    labelled = labels.reshape(-1) >= 0
    count = labelled.sum().clamp(min=1)
    assert total is not None
    token_losses = torch.where(labelled, total.log() + (1.0 - label_share) * cap, 0.0)
    weights = None
    if known is None:
        value = token_losses.sum() / count
    else:
        value, weights = preference_loss(token_losses, labels, known, loss, beta)
    if slopes is None:
        return value, token_losses, None
    weights = labelled.float() / count if weights is None else weights
    toward = (1.0 - label_share * label_share)[:, None] * rows.float()
    gradients = (slopes / total[:, None] - toward) * weights[:, None]
    return value, token_losses, gradients.to(hidden.dtype)


def _capped_grad(ctx: Any, dloss: Tensor, _: Any, __: Any) -> Any:
    return ctx.saved_tensors[0], *[None] * 7


capped_head_loss = _differentiable("capped_head_loss", open_capped_head, _head_fake, _capped_grad, _head_setup)
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    head_loss: open_head,
    capped_head_loss: open_capped_head,
    lora_linear: open_lora,
    frozen_linear: open_frozen,
}
"""Decompositions that a trace applies, by operator."""
INFERENCE: dict[Any, Callable[..., Any]] = {
    head_loss: open_head_without_gradient,
    capped_head_loss: open_capped_head_without_gradient,
}
"""Decompositions that replace them where no backward follows."""
