"""Cuts the graph of a module into segments, which become layers: each repeated block, and each stretch between
blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import fx

from tightfit.profiles.schema import TensorKind
from tightfit.profiles.tracing.fold import Role

aten = torch.ops.aten

# Cheap reshapes are repeated in each segment that uses their result, so that only real storages are passed between
# layers.
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    operator.getitem,
}
LARGEST_SEGMENT = 80
"""nodes of a forward above which a segment is cut further: what a layer's backward may recompute is decided layer by
layer
"""
IGNORED = {aten._assert_tensor_metadata.default, aten.sym_size.int, aten._assert_scalar.default}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a segment does in an evaluation."""

    module: fx.GraphModule
    inputs: list[tuple[str, TensorKind, fx.Node]]
    """name in the segment's program, kind, and a node of the same layout"""
    text: str
    """equal for segments that do the same"""


@dataclasses.dataclass(kw_only=True)
class Segment:
    name: str
    key: str | None
    nodes: list[fx.Node]
    inputs: list[fx.Node] = dataclasses.field(default_factory=list)
    outputs: list[fx.Node] = dataclasses.field(default_factory=list)
    module: fx.GraphModule | None = None
    differentiable: list[bool] = dataclasses.field(default_factory=list)
    """Per output: whether it carries a gradient."""
    evaluation: Evaluation | None = None
    """None: its forward, less what dropout leaves out"""


def path_of(node: fx.Node) -> str:
    """Where the module that calls a node stands in the model: ``model.layers.3.mlp``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def _layer_key(node: fx.Node) -> str | None:
    """The shortest module path that ends in an index: ``model.layers.3`` for anything inside that block."""
    match = re.match(r"((?:.*?\.)??\d+)(?:\.|$)", path_of(node))
    return match.group(1) if match else None


def _cut(
    name: str | None, nodes: list[fx.Node], most: int = LARGEST_SEGMENT, depth: int = 1
) -> list[tuple[str | None, list[fx.Node]]]:
    """A segment as it is, or, of more than `most` nodes, cut where the first `depth` names of their module paths
    change, and deeper where a piece is still larger; small pieces that follow each other stay together.
    """
    paths = [path_of(node).split(".") for node in nodes]
    if len(nodes) <= most or depth > max(map(len, paths)):
        return [(name, nodes)]
    pieces: list[tuple[str | None, list[fx.Node]]] = []
    for path, run in groupby(zip(paths, nodes), lambda pair: ".".join(pair[0][:depth])):
        for inner, members in _cut(path or None, [node for _, node in run], most, depth + 1):
            if pieces and len(pieces[-1][1]) + len(members) <= most:
                pieces[-1][1].extend(members)
            else:
                pieces.append((inner, members))
    return pieces


def _repeated_here(node: fx.Node) -> bool:
    return node.target in RESHAPES or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view)


def calls_of(graph: fx.Graph) -> list[fx.Node]:
    """The operators that segments consist of."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and node.target not in IGNORED and not _repeated_here(node)
    ]


def cut(graph: fx.Graph, tiles: int = 1) -> list[Segment]:
    """The graph cut into segments wherever `_layer_key` changes from one node to the next; large ones are cut
    further.
    """
    segments = [
        Segment(name="", key=name, nodes=nodes)
        for key, run in groupby(calls_of(graph), _layer_key)
        for name, nodes in _cut(key, list(run), tiles * LARGEST_SEGMENT)
    ]
    occurrences: dict[str, int] = {}
    for index, segment in enumerate(segments):
        first, last = index == 0, index == len(segments) - 1
        name = segment.key or ("stem" if first else "head" if last else f"between.{index}")
        occurrences[name] = occurrences.get(name, 0) + 1
        segment.name = name if occurrences[name] == 1 else f"{name}#{occurrences[name]}"
    return segments


def single_operators(graph: fx.Graph) -> list[Segment]:
    """Every operator as a segment of its own."""
    return [Segment(name=node.name, key=None, nodes=[node]) for segment in cut(graph) for node in segment.nodes]


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose storages a node's arguments lie in: reshapes are followed back to what they reshape."""
    for source in node.all_input_nodes:
        if source.op == "call_function" and _repeated_here(source) and source.target is not operator.getitem:
            yield from _sources(source)
        else:
            yield source


def connect(graph: fx.Graph, segments: list[Segment]) -> None:
    """Fill inputs, outputs and the standalone forward module of each segment."""
    owner = {node: segment for segment in segments for node in segment.nodes}

    def owner_of(node: fx.Node) -> Segment | None:
        while node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        return owner.get(node)

    results = list(graph.output_node().all_input_nodes)
    for segment in segments:
        copy = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}

        def bring(
            node: fx.Node, segment: Segment = segment, copy: fx.Graph = copy, mapped: dict[fx.Node, fx.Node] = mapped
        ) -> fx.Node:
            if node in mapped:
                return mapped[node]
            outside = node.op == "placeholder" or (owner_of(node) not in (None, segment))
            if outside and (node.target is operator.getitem or not _repeated_here(node)):
                mapped[node] = copy.placeholder(f"in{len(segment.inputs)}")
                mapped[node].meta["val"] = node.meta["val"]
                segment.inputs.append(node)
            else:
                for source in node.all_input_nodes:
                    bring(source)
                mapped[node] = copy.node_copy(node, mapped.__getitem__)
            return mapped[node]

        for node in segment.nodes:
            bring(node)
        segment.module = fx.GraphModule({}, copy)
        segment.module.meta["mapped"] = mapped
    for segment in segments:
        used_outside = {
            node for other in segments if other is not segment for node in other.inputs if owner_of(node) is segment
        }
        used_outside |= {node for node in results if owner_of(node) is segment}
        assert segment.module is not None
        mapped = segment.module.meta["mapped"]
        for node in graph.nodes:
            if node in used_outside:
                if node not in mapped:  # an output of a multi-output operator that only other segments use
                    mapped[node] = segment.module.graph.node_copy(node, mapped.__getitem__)
                segment.outputs.append(node)
        segment.module.graph.output(tuple(mapped[node] for node in segment.outputs))
        segment.module.recompile()


def kind_of(node: fx.Node, roles: Mapping[fx.Node, Role]) -> TensorKind:
    """What the input of a segment is to its program."""
    return roles[node].kind if node in roles else "activation"


def signature(segment: Segment, described: Callable[[fx.Node], object], extra: tuple[Any, ...] = ()) -> str:
    """A key that is equal for segments that differ only in names; `described` is what else there is to an input, beside
    its layout.
    """
    assert segment.module is not None
    order = {node: index for index, node in enumerate(segment.module.graph.nodes)}
    lines = []
    for node in segment.module.graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{order[n]}")
        lines.append(f"{node.op} {node.target if node.op == 'call_function' else ''} {args}")
    for node in segment.inputs:
        value = node.meta["val"]
        lines.append(f"{tuple(value.shape)} {value.stride()} {value.dtype} {described(node)}")
    lines.append(repr((extra, len(segment.outputs))))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
