"""Fuses additions of gradients into the matrix products that make them, in a layer's joint graph.

A decoder's projections, norms, attention and gates are fused operators already (`tightfit.profiles.tracing.torch_ops`).
What autograd adds between them are sums: the gradient of a tensor that several projections read (q, k and v; gate and
up) is the sum of their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import tightfit.profiles.tracing.dropout_ops  # noqa: F401  the operators named here, with those of torch_ops

aten = torch.ops.aten


PRODUCTS: dict[Any, int | None] = {
    aten.mm.default: None,
    torch.ops.tightfit.projection_backward.default: 4,
    torch.ops.tightfit.dropout_projection_backward.default: 6,
}
"""Products that can be fused with an addition -> position of their argument for the addend, None if there is none."""


RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def fuse_products(graph: fx.Graph) -> None:
    """Replace ``x + product`` by the product with x as its addend, if the product has no other use and x is made before
    it.

    ``a @ b`` (in modules that are not decoders) becomes ``addmm(x, a, b)``; `tightfit.projection_backward`, with
    dropout or without, takes the addend as an argument. Each fusion saves a tensor of the product's size and two passes
    over memory. Reshapes between product and sum, as in modules whose hidden states have three dimensions, are moved
    behind it.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        if not all(isinstance(argument, fx.Node) for argument in node.args):
            continue
        if any(argument.meta["val"].shape != node.meta["val"].shape for argument in node.args):
            continue
        pairs = [(_product(node.args[position]), _flat(node.args[1 - position])) for position in (0, 1)]
        fitting = [
            (product, other)
            for product, other in pairs
            if product is not None and order[other] < order[product] and _fits(other, product)
        ]
        if not fitting:
            continue
        product, other = max(fitting, key=lambda pair: order[pair[0]])
        target, position = product.target, PRODUCTS[product.target]
        assert callable(target)
        with graph.inserting_before(product):
            addend = _viewed(graph, other, product.meta["val"].shape)
            if position is None:
                fused = graph.call_function(aten.addmm.default, (addend, *product.args))
            else:
                fused = graph.call_function(target, (*product.args[:position], addend, *product.args[position + 1 :]))
        # Views of the sum are views of its storage, so the product takes that over.
        fused.meta.update(node.meta, val=node.meta["val"].view(product.meta["val"].shape))
        order[fused] = order[product]
        with graph.inserting_before(node):
            result = _viewed(graph, fused, node.meta["val"].shape)
        order[result] = order[node] if result is not fused else order[fused]
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        for view in _views_above(product):
            graph.erase_node(view)
        graph.erase_node(product)


def _product(node: fx.Node) -> fx.Node | None:
    """The product without addend that `node` is, possibly reshaped, if nothing else uses it."""
    while len(node.users) == 1 and node.target in RESHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target in PRODUCTS and len(node.users) == 1 and _free(node) else None


def _flat(node: fx.Node) -> fx.Node:
    """The node that `node` is a reshaped form of."""
    while node.target in RESHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _fits(other: fx.Node, product: fx.Node) -> bool:
    """Whether `other` can be seen as a tensor of the product's shape and type without a copy."""
    theirs, like = other.meta["val"], product.meta["val"]
    if theirs.numel() != like.numel() or theirs.dtype != like.dtype:
        return False
    same: bool = theirs.stride() == like.stride()
    return same if theirs.shape == like.shape else bool(theirs.is_contiguous() and like.is_contiguous())


def _viewed(graph: fx.Graph, node: fx.Node, shape: torch.Size) -> fx.Node:
    """`node` with another shape; the node itself if it has it."""
    if node.meta["val"].shape == shape:
        return node
    view = graph.call_function(aten.view.default, (node, list(shape)))
    view.meta["val"] = node.meta["val"].view(shape)
    return view


def _views_above(product: fx.Node) -> list[fx.Node]:
    """Reshapes that only lead from the product to a sum that is gone, the last first."""
    chain, node = [], product
    while node.users:
        (node,) = node.users
        chain.append(node)
    return chain[::-1]


def _free(product: fx.Node) -> bool:
    """Whether the product has no addend yet."""
    position = PRODUCTS[product.target]
    return position is None or product.args[position] is None
