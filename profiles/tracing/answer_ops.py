"""A placeholder for attention to a cache in the traced step of an answer. The process that answers replaces it by the
attention to its own cache of that layer.
"""

from __future__ import annotations

from torch import Tensor

from tightfit.profiles.tracing.torch_ops import _library, _registered

_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int kv_heads, int width, int? window, float scale) ->"
    " Tensor"
)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


attend = _registered("attend", _fake, _fake)
"""q [t, H * D], k, v [t, K * D] of new tokens, cos, sin float32 [t, D / 2] of their positions -> [t, H * D]: q and k
are rotated, the n-th call of a step puts k and v into the n-th cache, and q attends to what that holds: all of it, or a
token and `window` - 1 before.
"""
