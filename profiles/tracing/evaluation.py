"""Finds what each layer of a module does in an evaluation, in a trace of the module in eval mode.

That trace is cut where the step's was. A layer keeps its inputs and results, and gets operators of its own where it
does something else in eval mode. Where the two traces pass other tensors from layer to layer, layers are joined.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from tightfit.profiles.schema import TensorKind
from tightfit.profiles.tracing.batch_norm_ops import batch_norm
from tightfit.profiles.tracing.dropout_ops import dropout
from tightfit.profiles.tracing.fold import Role
from tightfit.profiles.tracing.segments import (
    RESHAPES,
    Evaluation,
    Segment,
    calls_of,
    connect,
    kind_of,
    path_of,
)

aten = torch.ops.aten
Roles = Mapping[fx.Node, Role]
_WITHOUT_BATCH = aten._native_batch_norm_legit_no_training.default
_SHAPES = RESHAPES - {operator.getitem}
_LOADED = ("trainable", "weight")
"""kinds of tensors that a plan loads for a layer, in an evaluation as in a step"""


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Within this context the module is as `module.eval()` leaves it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def with_evaluations(
    graph: fx.Graph, roles: Roles, segments: Sequence[Segment], evaluated: fx.Graph, evaluated_roles: Roles
) -> list[Segment] | None:
    """The unconnected `segments` of a step's graph, with what they do in the graph `evaluated` of the module in eval
    mode, some joined where that is something else; None if no layers pass on the same tensors in both.
    """
    texts = [
        _computed(one, [own[node].name for node in one.find_nodes(op="placeholder") if node in own])
        for one, own in ((graph, roles), (evaluated, evaluated_roles))
    ]
    if texts[0] == texts[1]:
        return list(segments)
    matches = _matches(segments, evaluated)
    groups = [[segment] for segment in segments]
    while True:
        step = [_joined(group) for group in groups]
        connect(graph, step)
        alone = _as_cut(step, evaluated, matches)
        connect(evaluated, alone)
        apart = _apart(graph, step, evaluated, alone, matches)
        if isinstance(apart, dict):
            return _paired(step, alone, roles, evaluated_roles, apart)
        first, last = apart
        if first == last:
            return None
        groups[first : last + 1] = [[segment for group in groups[first : last + 1] for segment in group]]


_Pairs = dict[fx.Node, fx.Node]
"""a result of a layer in the evaluation -> the same result in the step"""


def _joined(group: Sequence[Segment]) -> Segment:
    first = group[0]
    return Segment(name=first.name, key=first.key, nodes=[node for segment in group for node in segment.nodes])


def _matches(segments: Sequence[Segment], evaluated: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Which operator of the step each operator of the evaluation is, as far as both are alike."""
    step = [node for segment in segments for node in segment.nodes]
    alone = calls_of(evaluated)
    alike = difflib.SequenceMatcher(
        None, [_described(node) for node in step], [_described(node) for node in alone], autojunk=False
    )
    return {
        alone[block.b + offset]: step[block.a + offset]
        for block in alike.get_matching_blocks()
        for offset in range(block.size)
    }


def _described(node: fx.Node) -> tuple[str, str]:
    norm = node.target in (_WITHOUT_BATCH, batch_norm)
    return path_of(node), "batch_norm" if norm else str(node.target)


def _as_cut(step: Sequence[Segment], evaluated: fx.Graph, matches: Mapping[fx.Node, fx.Node]) -> list[Segment]:
    """The evaluation's operators in segments like those of the step: what has no match goes with what it has a path in
    common with, of the segments of the matches around it.
    """
    owner = {node: index for index, segment in enumerate(step) for node in segment.nodes}
    paths = [{path_of(node) for node in segment.nodes} for segment in step]
    calls = calls_of(evaluated)
    following = [len(step) - 1] * len(calls)
    for position in range(len(calls) - 1, -1, -1):
        found = matches.get(calls[position])
        later = following[position + 1] if position + 1 < len(calls) else len(step) - 1
        following[position] = later if found is None else owner[found]
    pieces = [Segment(name=segment.name, key=segment.key, nodes=[]) for segment in step]
    index = 0
    for node, latest in zip(calls, following, strict=True):
        found = matches.get(node)
        if found is not None:
            index = owner[found]
        else:
            index = next((i for i in range(index, latest + 1) if path_of(node) in paths[i]), index)
        pieces[index].nodes.append(node)
    return pieces


def _apart(
    graph: fx.Graph,
    step: Sequence[Segment],
    evaluated: fx.Graph,
    alone: Sequence[Segment],
    matches: Mapping[fx.Node, fx.Node],
) -> _Pairs | tuple[int, int]:
    """The pairs of results, or, where the segments pass on other tensors, the first and last of those to be joined."""
    for index, segment in enumerate(alone):
        if not segment.nodes:
            return (index - 1, index) if index else (0, min(1, len(step) - 1))
    readers, alone_readers = _readers(graph, step), _readers(evaluated, alone)
    pairs: _Pairs = {}
    for index, (theirs, ours) in enumerate(zip(step, alone, strict=True)):
        open_results = list(ours.outputs)
        unpaired: list[fx.Node] = []
        for result in theirs.outputs:
            like = [
                node
                for node in open_results
                if alone_readers[node] == readers[result]
                and _shapes(node) & _shapes(result)
                and node.meta["val"].dtype == result.meta["val"].dtype
            ]
            if not like:
                unpaired.append(result)
                continue
            best = next((node for node in like if _origin(node, matches) is _maker(result)), like[0])
            pairs[best] = result
            open_results.remove(best)
        if unpaired or open_results:
            read = [*(readers[node] for node in unpaired), *(alone_readers[node] for node in open_results)]
            return index, max(index, *(reader for found in read for reader in found if isinstance(reader, int)), index)
    return pairs


def _shapes(node: fx.Node) -> set[torch.Size]:
    """The shapes in which a result is read."""
    return {node.meta["val"].shape, *(user.meta["val"].shape for user in node.users if user.target in _SHAPES)}


def _maker(node: fx.Node) -> fx.Node:
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _origin(node: fx.Node, matches: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    return matches.get(_maker(node))


def _readers(graph: fx.Graph, segments: Sequence[Segment]) -> dict[fx.Node, set[int | str]]:
    """By result of a segment: the numbers of the segments that read it, and which result of the graph it is."""
    readers: dict[fx.Node, set[int | str]] = {node: set() for segment in segments for node in segment.outputs}
    for index, segment in enumerate(segments):
        for node in segment.inputs:
            if node in readers:
                readers[node].add(index)
    for number, node in enumerate(graph.output_node().all_input_nodes):
        if node in readers:
            readers[node].add(f"result {number}")
    return readers


def _paired(
    step: Sequence[Segment], alone: Sequence[Segment], roles: Roles, evaluated_roles: Roles, pairs: _Pairs
) -> list[Segment] | None:
    """The segments of the step, unconnected, each with what it does in an evaluation where that is something else; None
    if an evaluation loads other tensors for one.
    """
    found_segments: list[Segment] = []
    for theirs, ours in zip(step, alone, strict=True):
        assert theirs.module is not None
        assert ours.module is not None
        names = {_input(node, roles): index for index, node in enumerate(theirs.inputs)}
        inputs: list[tuple[str, TensorKind, fx.Node]] = []
        for node in ours.inputs:
            found = names.get(_input(pairs.get(node, node), {**roles, **evaluated_roles}))
            kind = kind_of(node, evaluated_roles)
            if found is None:
                if kind in _LOADED or kind == "activation":
                    return None
                inputs.append((f"in{len(theirs.inputs) + len(inputs)}", kind, node))
            else:
                inputs.append((f"in{found}", kind, theirs.inputs[found]))
        read = {name for name, _, _ in inputs}
        if any(
            f"in{index}" not in read and kind_of(node, roles) in (*_LOADED, "activation")
            for index, node in enumerate(theirs.inputs)
        ):
            return None
        _pass_on(ours, theirs, pairs)
        unconnected = _joined([theirs])
        text = _computed(ours.module.graph, [name for name, _, _ in inputs])
        if text != _computed(theirs.module.graph, [f"in{index}" for index in range(len(theirs.inputs))]):
            unconnected.evaluation = Evaluation(module=ours.module, inputs=inputs, text=text)
        found_segments.append(unconnected)
    return found_segments


def _pass_on(ours: Segment, theirs: Segment, pairs: _Pairs) -> None:
    """Have a segment of the evaluation take and return what that of the step does, in its order and shapes."""
    assert ours.module is not None
    graph, mapped = ours.module.graph, ours.module.meta["mapped"]

    def reshaped(node: fx.Node, value: torch.Tensor, shape: torch.Size, *, copied: bool = False) -> fx.Node:
        if value.shape == shape:
            return node
        made = graph.call_function(aten.reshape.default, (node, list(shape)))
        with value.fake_mode:  # type: ignore[attr-defined]
            made.meta["val"] = value.new_empty(shape)
        if copied:
            made = graph.call_function(aten.clone.default, (made,))
            made.meta["val"] = made.args[0].meta["val"]  # type: ignore[union-attr]
        return made

    for node in ours.inputs:
        given = pairs.get(node, node).meta["val"]
        placeholder = mapped[node]
        with graph.inserting_after(placeholder):
            wanted = reshaped(placeholder, given, node.meta["val"].shape)
        placeholder.meta["val"] = given
        if wanted is not placeholder:
            placeholder.replace_all_uses_with(wanted, delete_user_cb=lambda user, wanted=wanted: user is not wanted)
    # What is passed on lies as the operator that makes it in the step leaves it.
    results = {pairs[node]: node for node in ours.outputs}
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (
            tuple(
                reshaped(mapped[results[node]], results[node].meta["val"], node.meta["val"].shape, copied=True)
                for node in theirs.outputs
            ),
        )
    ours.module.recompile()


def _input(node: fx.Node, roles: Roles) -> object:
    return roles[node].name if node in roles else node


def _computed(graph: fx.Graph, inputs: Sequence[str]) -> str:
    """What a segment computes in an evaluation, in a text that is equal for equal computations: of a step's segment
    without what it leaves out, and with batch normalisation by running statistics.
    """
    names = iter(inputs)
    drawn = 0
    words: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            words[node] = next(names)
        elif node.target is dropout:
            words[node] = words[node.args[0]]
        elif node.op == "call_function" and (source := _reshaped(node)) is not None:
            same = source.meta["val"].shape == node.meta["val"].shape
            words[node] = words[source] if same else f"{words[source]}.{list(node.meta['val'].shape)}"
        elif node.op != "output":
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                drawn += 1
            target = _WITHOUT_BATCH if node.target is batch_norm else node.target
            text = f"{target} {drawn} {fx.map_arg((node.args, node.kwargs), words.__getitem__)}"
            words[node] = hashlib.sha256(text.encode()).hexdigest()
    return str(fx.map_arg(graph.output_node().args, words.__getitem__))


def _reshaped(node: fx.Node) -> fx.Node | None:
    """What a reshape is made of, back to what lies in memory, or to what is again of its shape; None for others."""
    source: Any = node
    while source.op == "call_function" and (source.target in _SHAPES or source.target is dropout):
        source = source.args[0]
        if source.meta["val"].shape == node.meta["val"].shape:
            break
    return None if source is node else source
