"""Makes the backward of a layer's joint graph keep fewer tensors, with the same results.

What autograd saves suits a process that keeps all of it. A tensor that a backward reads only the shape of need not be
kept at all. A layer's output, which the next layer's backward often needs as well, has to be kept until both have run,
where a tensor of the layer's own may be kept, moved to disk or made again. And the gradient of a cross entropy needs no
tensor for that of its second half, which is zero but for one element in each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit.profiles.tracing.torch_ops import _define

aten = torch.ops.aten

SHAPES: dict[Any, int] = {
    aten.max_pool2d_with_indices_backward.default: 1,
    aten.avg_pool2d_backward.default: 1,
    aten._adaptive_avg_pool2d_backward.default: 1,
}
"""Operators -> place of an argument of which they read only the shape."""
MEAN = 1
"""PyTorch's number of the reduction to a mean"""


cross_entropy_backward = _define(
    "cross_entropy_backward",
    "(Tensor dloss, Tensor log_shares, Tensor labels, Tensor total, int ignored, bool mean) -> Tensor",
    lambda dloss, log_shares, *_: (log_shares.new_empty(log_shares.shape),),
)


def save_less(graph: fx.Graph, forward: int, mode: FakeTensorMode) -> None:
    """Rewrite a joint graph, whose first `forward` results are the forward's, in which tensors have fake values of
    `mode`.
    """
    results: Any = graph.output_node().args[0]
    outputs = {_itself(node) for node in results[:forward]}
    node: Any
    for node in list(graph.nodes):
        if node.target in SHAPES:
            _read_a_stand_in(graph, node, SHAPES[node.target], mode)
        elif node.target is aten.threshold_backward.default:
            source = _itself(node.args[1])
            # relu(x) is above the threshold 0 where x is.
            if source in outputs and source.target is aten.relu.default and node.args[2] == 0:
                node.args = (node.args[0], source.args[0], 0)
        elif node.target is aten._log_softmax_backward_data.default:
            _join_with_loss(graph, node)


def _join_with_loss(graph: fx.Graph, node: Any) -> None:
    """Replace the gradient of a log softmax over rows, where it follows that of `nll_loss` without weights, by that of
    both.
    """
    nll_gradient, log_shares, dim, dtype = node.args
    if nll_gradient.target is not aten.nll_loss_backward.default or len(nll_gradient.users) > 1:
        return
    dloss, shares, labels, weight, reduction, ignored, total = nll_gradient.args
    value = log_shares.meta["val"]
    if (
        (weight is not None or reduction == 0 or value.dim() != 2 or dim % 2 != 1)
        or (value.dtype is not torch.float32 or dtype is not torch.float32)
        or _itself(shares) is not _itself(log_shares)
    ):
        return
    with graph.inserting_before(node):
        fused = graph.call_function(
            cross_entropy_backward, (dloss, log_shares, labels, total, ignored, reduction == MEAN)
        )
    fused.meta.update(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)
    graph.erase_node(nll_gradient)


def _itself(node: Any) -> Any:
    """The node that `node` is a detached form of, as autograd saves results."""
    while node.target is aten.detach.default:
        node = node.args[0]
    return node


def _read_a_stand_in(graph: fx.Graph, node: Any, index: int, mode: FakeTensorMode) -> None:
    """Have a node read a tensor of one element, expanded, for one of which it needs the shape."""
    replaced = node.args[index].meta["val"]
    with graph.inserting_before(node):
        element = graph.call_function(aten.full.default, ([], 0), {"dtype": replaced.dtype})
        expanded = graph.call_function(aten.expand.default, (element, list(replaced.shape)))
    with mode:
        element.meta["val"] = torch.full([], 0, dtype=replaced.dtype)
        expanded.meta["val"] = element.meta["val"].expand(replaced.shape)
    node.args = (*node.args[:index], expanded, *node.args[index + 1 :])
