"""Rewrites of the joint graph before it becomes a program: the same sums in fewer passes over memory."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def fuse_products(graph: fx.Graph) -> None:
    """``x + a @ b`` becomes ``addmm(x, a, b)`` where the product has no other use and x exists before it.

    Saves a tensor of the product's size and two passes over memory: backward of a projection with a LoRA pair is
    dy @ W + du @ A, a chain of such sums.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        products = [
            n for n in node.args if isinstance(n, fx.Node) and n.target is aten.mm.default and len(n.users) == 1
        ]
        products = [
            n
            for n in products
            if all(isinstance(other, fx.Node) and order[other] < order[n] for other in node.args if other is not n)
        ]
        if not products:
            continue
        product = max(products, key=order.__getitem__)
        other = node.args[1] if node.args[0] is product else node.args[0]
        like, own = node.meta["val"], other.meta["val"]
        if own.shape != like.shape or own.dtype != like.dtype or own.stride() != like.stride():
            continue
        with graph.inserting_before(product):
            fused = graph.call_function(aten.addmm.default, (other, *product.args))
        fused.meta.update(node.meta)
        order[fused] = order[product]
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(product)
