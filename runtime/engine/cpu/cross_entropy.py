"""The gradient of a cross entropy in one go: that of PyTorch's `nll_loss` is zero but for one element of each row, and
takes as much memory as the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cross_entropy_backward(
    dloss: Tensor, log_shares: Tensor, labels: Tensor, total: Tensor, ignored: int, mean: bool, *, out: Sequence[Tensor]
) -> None:
    """d logits = (exp(log_shares) - 1 at the label) * dloss, divided by `total` for a `mean`; zero in rows whose label
    is `ignored`. dloss and total: scalars; log_shares, out [N, C]; labels int64 [N].
    """
    (dlogits,) = out
    counted = labels != ignored
    slope = (dloss / total if mean else dloss) * counted
    torch.exp(log_shares, out=dlogits).mul_(slope.unsqueeze(1))
    dlogits.scatter_add_(1, (labels * counted).unsqueeze(1), -slope.unsqueeze(1))
