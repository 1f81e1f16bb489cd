"""Gradients that several operators of a layer contribute to, summed in float32 and in place: those of keys and values
that several tiles of a row attend to, that of what a matrix in slices multiplies, what the experts of a mixture make,
and those of their pairs.

Autograd adds what each tile contributes, rounded to the keys' type, in an operator of its own. `fuse_sums` has
`tightfit.tile_attention_backward`, and the experts' backward, add to the sums of the tiles behind it; `sums_in_place`
then gives a new sum the storage of the old one, so that a key tile has one sum, and a pair one gradient, however many
tiles contribute.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tightfit.profiles.schema import Operator, Program
from tightfit.profiles.tracing.expert_ops import adapted_experts_backward
from tightfit.profiles.tracing.inference import renamed
from tightfit.profiles.tracing.tile_ops import tile_attention_backward

aten = torch.ops.aten

BACKWARD = "tightfit.tile_attention_backward"
SLICE_BACKWARD = "tightfit.projection_backward"
ADDEND_AT, DTYPE_AT = 4, 5
TOTALS = {
    "tightfit.experts": ((0, 0),),
    "tightfit.experts_backward": ((0, 0), (1, 1)),
    "tightfit.adapted_experts": ((0, 0),),
    "tightfit.adapted_experts_backward": ((0, 0), (1, 1), (18, 4), (19, 5), (20, 6), (21, 7)),
}
"""operators that are given sums so far -> the place of each among the arguments, and of the new one among the
outputs
"""
PAIR_SUMS = TOTALS["tightfit.adapted_experts_backward"][2:]
"""of these, the gradients of the factors of pairs"""
KEYS_AT = 2
SUMS_AT = 7, 8
"""places of the arguments that are the sums so far, of keys and of values"""


def fuse_sums(graph: fx.Graph) -> None:
    """Replace autograd's additions by sums that each tile's backward hands to the next, where nothing else
    contributes.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=tile_attention_backward):
        tiles = len(node.args[KEYS_AT])
        if node.args[SUMS_AT[0]] is not None:
            continue
        items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        contributed = [_added(items.get(index)) for index in range(1, 1 + 2 * tiles)]
        before = _before(contributed, node, order)
        if not before:
            continue
        updated = list(node.args)
        updated[SUMS_AT[0]], updated[SUMS_AT[1]] = before[:tiles], before[tiles:]
        node.args = tuple(updated)
        _leave_out(graph, contributed)
    for node in graph.find_nodes(op="call_function", target=adapted_experts_backward):
        items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        contributed = [_added(items.get(new)) for _, new in PAIR_SUMS]
        first = node  # of the calls for the experts of a tile, each of which goes on with the sums of the call before
        while first.args[0] is not None:
            first = first.args[0].args[0]
        before = _before(contributed, first, order)
        if not before:
            continue
        updated = list(first.args)
        for (place, _), old in zip(PAIR_SUMS, before, strict=True):
            updated[place] = old
        first.args = tuple(updated)
        _leave_out(graph, contributed)


Contribution = tuple[fx.Node, fx.Node, fx.Node]
"""what `_added` returns"""


def _before(contributed: Sequence[Contribution | None], node: fx.Node, order: Mapping[fx.Node, int]) -> list[fx.Node]:
    """What other tiles have made of the sums that a tile contributes to, from its operator `node` on; none unless all
    of it is there by then.
    """
    before = [found[2] for found in contributed if found is not None]
    return before if len(before) == len(contributed) and all(order[old] < order[node] for old in before) else []


def _leave_out(graph: fx.Graph, contributed: Iterable[Contribution | None]) -> None:
    """Remove autograd's additions, whose sums the contributions are now."""
    for found in contributed:
        assert found is not None
        addition, own, _ = found
        other = next(argument for argument in addition.all_input_nodes if argument is not own)
        _take_over(own, addition)
        addition.replace_all_uses_with(own)
        graph.erase_node(addition)
        if not other.users and other.target is aten._to_copy.default:
            graph.erase_node(other)


def _take_over(node: fx.Node, replaced: fx.Node) -> None:
    """Give a node the traced tensor of one that it replaces: views of that tensor are views of its storage."""
    node.meta["val"] = replaced.meta["val"]
    if node.target is operator.getitem:
        maker, index = node.args
        values = list(maker.meta["val"])  # type: ignore[union-attr]
        values[index] = node.meta["val"]  # type: ignore[index]
        maker.meta["val"] = values  # type: ignore[union-attr]


def _added(item: fx.Node | None) -> Contribution | None:
    """Where a contribution is used once, in an addition to an earlier tile's: the addition, the contribution as it is
    added, and what the other tile made.
    """
    if item is None or len(item.users) != 1:
        return None
    own = item
    (user,) = item.users
    if user.target is aten._to_copy.default:
        own = user
        if len(own.users) != 1:
            return None
        (user,) = own.users
    if user.target is not aten.add.Tensor or user.kwargs or len(user.all_input_nodes) != 2:
        return None
    other = next(argument for argument in user.all_input_nodes if argument is not own)
    made = other.all_input_nodes[0] if other.target is aten._to_copy.default else other
    is_sum = made.target is operator.getitem and made.args[0].target is item.args[0].target  # type: ignore[union-attr]
    alone = len(other.users) == 1 and (made is other or len(made.users) == 1)
    return (user, own, made) if is_sum and alone else None


def sums_in_place(program: Program, results: Collection[str]) -> Program:
    """The program with the storage of each new sum in the place of the old one's, where nothing reads the old one
    afterwards and it is none of the program's `results`.
    """
    made = {name for step in program.operators for name in step.outputs if name is not None}
    last_read = {name: index for index, step in enumerate(program.operators) for name in step.inputs}
    names: dict[str, str] = {}
    for index, step in enumerate(program.operators):
        for old, new in _sums(step):
            name = old["operand"]["value"]
            if new is not None and name in made and name not in results and last_read[name] == index:
                names[name] = new
    if not names:
        return program
    final = {name: _last(name, names) for name in names}
    return program.model_copy(
        update={
            "values": [value for value in program.values if value.name not in names],
            "operators": [renamed(step, final) for step in program.operators],
        }
    )


def _sums(step: Operator) -> Iterable[tuple[Any, str | None]]:
    """The operands that are sums so far, in float32, each with the output that is the new sum."""
    if step.target == BACKWARD and step.args[SUMS_AT[0]] is not None:
        return zip([*step.args[SUMS_AT[0]], *step.args[SUMS_AT[1]]], step.outputs[1:-1], strict=True)
    if step.target in TOTALS:
        places = TOTALS[step.target]
        return [(step.args[old], step.outputs[new]) for old, new in places if step.args[old] is not None]
    if step.target == SLICE_BACKWARD and len(step.args) > DTYPE_AT and step.args[DTYPE_AT] and step.args[ADDEND_AT]:
        return [(step.args[ADDEND_AT], step.outputs[0])]
    return []


def _last(name: Any, names: dict[str, str]) -> str:
    while name in names:
        name = names[name]
    return str(name)
