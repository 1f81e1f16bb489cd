"""Traces the forward of a module that trains nothing, while it runs on a few tokens and on parameters without memory.

`torch.export` and fake tensors, and PyTorch's own operators on the meta device, import 80 MiB of Python, more than
answers may take. So activations may be in memory here; tightfit's operators, which alone read parameters then, make
outputs without looking at values where one of their inputs is on the meta device. Within a FakeTensorMode nothing has
values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.profiles.schema import Layer, Program
from tightfit.profiles.tracing.fold import Role, fold
from tightfit.profiles.tracing.segments import connect, cut, kind_of, signature
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS
from tightfit.profiles.tracing.traced import Trace, global_tensors


class _Recording(TorchDispatchMode):
    """While entered, every operator becomes a node of `graph`, but for those that compute the same in every call."""

    def __init__(self, module: nn.Module, *, with_values: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: dict[fx.Node, Tensor] = {}
        """what the graph reads and no input has a part in"""
        self._with_values = with_values
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        """by the id of a tensor, which is held so that the id stays its own"""
        self._names = {id(child): name for name, child in module.named_modules()}
        self._path = [""]
        """the names of the modules whose forward runs, the innermost last"""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would import its compiler for that."""
        return False

    @contextmanager
    def following(self) -> Iterator[None]:
        """Within this context it is known which module runs."""
        begun = register_module_forward_pre_hook(
            lambda child, _: self._path.append(self._names.get(id(child), self._path[-1]))
        )
        ended = register_module_forward_hook(lambda *_: self._leave())
        try:
            yield
        finally:
            begun.remove()
            ended.remove()

    def _leave(self) -> None:
        self._path.pop()

    def given(self, name: str, tensor: Tensor) -> fx.Node:
        """The node of an input, a parameter or a constant."""
        node = self.graph.placeholder(name)
        self._keep(node, tensor)
        return node

    def node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            self.constants[self.given(f"constant.{len(self.constants)}", tensor)] = tensor
        return self._nodes[id(tensor)][1]

    def _keep(self, node: fx.Node, value: Any) -> None:
        """Note what a node stands for."""
        node.meta.update(val=value, nn_module_stack={"": (self._path[-1], None)})
        if isinstance(value, Tensor):
            self._nodes[id(value)] = value, node
            return
        for place, each in enumerate(value):
            if each is not None:
                self._keep(self.graph.call_function(operator.getitem, (node, place)), each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[func](*args, **(kwargs or {}))
        outputs = func(*args, **(kwargs or {}))
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(outputs)):
            return outputs
        depends = any(id(leaf) in self._nodes for leaf in pytree.tree_leaves((args, kwargs)))
        if depends or not self._with_values:
            nodes = pytree.tree_map_only(Tensor, self.node, (args, kwargs or {}))
            self._keep(self.graph.call_function(func, *nodes), outputs)
        return outputs


def trace_forward(module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Trace, dict[str, Tensor]]:
    """The trace of the forward on `batch`, of a module whose one result is no view, and what the trace reads beside the
    batch and the module's own tensors, by name. The trace's `loss` is the result's name.

    Without a FakeTensorMode the module's tensors are on the meta device, and no others than tightfit's operators read
    them.
    """
    recording = _Recording(module, with_values=all(type(tensor) is Tensor for tensor in batch.values()))
    graph = recording.graph
    roles = {recording.given(name, tensor): Role(name=name, kind="batch") for name, tensor in batch.items()}
    for name, parameter in module.named_parameters():
        roles[recording.given(name, parameter)] = Role(name=name, kind="weight" if parameter.dim() > 1 else "constant")
    for name, buffer in module.named_buffers():
        roles[recording.given(name, buffer)] = Role(name=name, kind="constant")
    with torch.no_grad(), recording.following(), recording:
        result = module(*batch.values())
    roles |= {node: Role(name=str(node.target), kind="constant") for node in recording.constants}
    graph.output((recording.node(result),))
    graph.eliminate_dead_code()
    segments = cut(graph)
    connect(graph, segments)
    names = {node: role.name for node, role in roles.items()}
    programs: dict[str, Program] = {}
    layers = []
    for segment in segments:
        assert segment.module is not None
        names |= {node: f"{segment.name}/out{index}" for index, node in enumerate(segment.outputs)}
        key = signature(segment, lambda node: kind_of(node, roles))
        if key not in programs:
            programs[key] = fold(
                segment.module.graph,
                name=f"program{len(programs)}",
                inputs=[(f"in{index}", kind_of(node, roles)) for index, node in enumerate(segment.inputs)],
                results=[(f"out{index}", node.meta["val"].stride()) for index, node in enumerate(segment.outputs)],
                forward=len(segment.outputs),
            )
        bindings = {f"in{index}": names[node] for index, node in enumerate(segment.inputs)}
        bindings |= {f"out{index}": names[node] for index, node in enumerate(segment.outputs)}
        present = {value.name for value in programs[key].values}
        bindings = {value: name for value, name in bindings.items() if value in present}
        layers.append(Layer(name=segment.name, program=programs[key].name, bindings=bindings))
    traced = Trace(
        tensors=global_tensors(layers, {program.name: program for program in programs.values()}),
        programs=list(programs.values()),
        layers=layers,
        loss=names[recording.node(result)],
        token_losses=None,
    )
    read = {tensor.name for tensor in traced.tensors}
    constants = {names[node]: tensor for node, tensor in recording.constants.items() if names[node] in read}
    return traced, constants
