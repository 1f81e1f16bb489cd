"""Makes the backward of a layer's joint graph read fewer tensors of its forward, with the same results to the bit.

What autograd saves suits a process that keeps all of it. A tensor that a backward reads only the shape of need not be kept at all;
and a layer's output, which the next layer's backward often needs as well, has to be kept until both have run, where a tensor of
the layer's own may be kept, moved to disk or made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten

SHAPES: dict[Any, int] = {
    aten.max_pool2d_with_indices_backward.default: 1,
    aten.avg_pool2d_backward.default: 1,
    aten._adaptive_avg_pool2d_backward.default: 1,
}
"""Operators -> place of an argument of which they read only the shape."""


def save_less(graph: fx.Graph, forward: int, mode: FakeTensorMode) -> None:
    """Rewrite a joint graph, whose first `forward` results are the forward's, in which tensors have fake values of `mode`."""
    results: Any = graph.output_node().args[0]
    outputs = {_itself(node) for node in results[:forward]}
    node: Any
    for node in list(graph.nodes):
        if node.target in SHAPES:
            _read_a_stand_in(graph, node, SHAPES[node.target], mode)
        elif node.target is aten.threshold_backward.default:
            made = _itself(node.args[1])
            # relu(x) is above the threshold 0 where x is.
            if made in outputs and made.target is aten.relu.default and node.args[2] == 0:
                node.args = (node.args[0], made.args[0], 0)


def _itself(node: Any) -> Any:
    """The node that `node` is a detached form of, as autograd saves results."""
    while node.target is aten.detach.default:
        node = node.args[0]
    return node


def _read_a_stand_in(graph: fx.Graph, node: Any, place: int, mode: FakeTensorMode) -> None:
    """Have a node read a tensor of one element, expanded, for one of which it needs the shape."""
    like = node.args[place].meta["val"]
    with graph.inserting_before(node):
        element = graph.call_function(aten.full.default, ([], 0), {"dtype": like.dtype})
        shaped = graph.call_function(aten.expand.default, (element, list(like.shape)))
    with mode:
        element.meta["val"] = torch.full([], 0, dtype=like.dtype)
        shaped.meta["val"] = element.meta["val"].expand(like.shape)
    node.args = (*node.args[:place], shaped, *node.args[place + 1 :])
