"""Fuses additions of gradients into the matrix products that make them, in a layer's joint graph.

A decoder's projections, norms, attention and gates are fused operators already (`tightfit.profiles.tracing.torch_ops`).
What autograd adds between them are sums: the gradient of a tensor that several projections read (q, k and v; gate and
up) is the sum of their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import tightfit.profiles.tracing.torch_ops  # noqa: F401  the operators named here

aten = torch.ops.aten


PRODUCTS: dict[Any, int | None] = {aten.mm.default: None, torch.ops.tightfit.projection_backward.default: 4}
"""Products that can be fused with an addition -> position of their argument for the addend, None if there is none."""


def fuse_products(graph: fx.Graph) -> None:
    """Replace ``x + product`` by the product with x as its addend, if the product has no other use and x is made before
    it.

    ``a @ b`` (in modules that are not decoders) becomes ``addmm(x, a, b)``; `tightfit.projection_backward` takes the
    addend as an argument. Each fusion saves a tensor of the product's size and two passes over memory.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        products = [
            n for n in node.args if isinstance(n, fx.Node) and n.target in PRODUCTS and len(n.users) == 1 and _free(n)
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
        target, place = product.target, PRODUCTS[product.target]
        assert callable(target)
        with graph.inserting_before(product):
            if place is None:
                fused = graph.call_function(aten.addmm.default, (other, *product.args))
            else:
                fused = graph.call_function(target, (*product.args[:place], other, *product.args[place + 1 :]))
        fused.meta.update(node.meta)
        order[fused] = order[product]
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(product)


def _free(product: fx.Node) -> bool:
    """Whether the product has no addend yet."""
    place = PRODUCTS[product.target]
    return place is None or product.args[place] is None
