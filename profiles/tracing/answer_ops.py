"""The operator by which the step of an answer attends to a cache, as it is traced: the process that answers puts the
attention to the cache of that layer in its place.
"""

from __future__ import annotations

from torch import Tensor

from tightfit.profiles.tracing.torch_ops import _library, _registered

_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int kv_heads, int width, int? window, float scale) -> Tensor"
)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


attend = _registered("attend", _fake, _fake)
"""q [t, H * D], k, v [t, K * D] of new tokens, cos, sin float32 [t, D / 2] of their positions -> [t, H * D]: q and k are rotated, k and
v are put into the cache of the call's own place among all of a step, and q attends to what it holds, with a `window` to a token and `window` - 1 tokens before it."""
