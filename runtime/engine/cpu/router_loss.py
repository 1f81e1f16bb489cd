"""The loss of a mixture's routers, which is small where experts get equally many tokens, as functions of the routers'
scores.

It multiplies, for each expert, the share of tokens that chose it with its mean probability, both over all layers and
tokens, and sums up. So a layer hands two sums for each expert to the next one, and nothing of the size of its tokens.

Source: Fedus et al. 2021, "Switch Transformers", equations 4 to 6, as `load_balancing_loss_func` of transformers has
them.

Shapes: T = batch * seq tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def counted_tokens(labels: Tensor, *, out: Sequence[Tensor]) -> None:
    """1 for tokens, 0 for the padding of a row, which is what comes behind its last label. labels int64 [batch, seq],
    below 0 for none; out: float32 [T].
    """
    later = (labels >= 0).flip(-1).cumsum(-1)
    torch.gt(later.flip(-1).view(-1), 0, out=out[0])


def router_totals(total: Tensor | None, scores: Tensor, counted: Tensor, chosen: int, *, out: Sequence[Tensor]) -> None:
    """total + for each expert how many tokens are among those whose `chosen` best scores it has, and the sum of its
    probabilities.

    scores [T, E]; counted float32 [T], of `counted_tokens`; total and out: float32 [2, E].
    """
    (made,) = out
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    index = torch.topk(probabilities, chosen, dim=-1).indices
    if total is None:
        made.zero_()
    else:
        made.copy_(total)
    made[0].scatter_add_(0, index.view(-1), counted.repeat_interleave(chosen))
    made[1].add_(probabilities.mul_(counted[:, None]).sum(0))


def router_totals_backward(dtotal: Tensor, scores: Tensor, counted: Tensor, *, out: Sequence[Tensor]) -> None:
    """The gradient of `scores`, like them. dtotal float32 [2, E], whose first row, of counts, has no gradient."""
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    mean = (probabilities * dtotal[1]).sum(-1, keepdim=True)
    out[0].copy_((dtotal[1] - mean).mul_(probabilities).mul_(counted[:, None]))


def router_loss(total: Tensor, counted: Tensor, layers: int, coefficient: float, *, out: Sequence[Tensor]) -> None:
    """The loss times `coefficient`, given the `total` [2, E] of so many layers. out: float32 [], and its gradient by
    `total` [2, E].
    """
    loss, gradient = out
    tokens = counted.sum().mul_(layers).clamp_(min=1.0)
    factor = coefficient * total.shape[1] / tokens.square()
    torch.mul(torch.dot(total[0], total[1]), factor, out=loss)
    gradient[0].zero_()
    torch.mul(total[0], factor, out=gradient[1])
