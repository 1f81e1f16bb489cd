"""Traces the forward of a part of a module by itself, while it runs on a few tokens and on parameters without memory.

`torch.export` and fake tensors, and PyTorch's own operators on the meta device, import 80 MiB of Python, more than
answers may take. So activations are in memory here; tightfit's operators, which alone read parameters, make outputs
without looking at values where one of their inputs is on the meta device.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.profiles.schema import Program, TensorKind
from tightfit.profiles.tracing.fold import fold
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS


class _Recording(TorchDispatchMode):
    """While entered, every operator becomes a node of `graph`, but for those that compute the same in every call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        """what the graph reads and no input has a part in, by name"""
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        """by the id of a tensor, which is held so that the id stays its own"""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would import its compiler for that."""
        return False

    def node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            name = f"constant.{len(self.constants)}"
            self.constants[name] = tensor
            self.keep(self.graph.placeholder(name), tensor)
        return self._nodes[id(tensor)][1]

    def keep(self, node: fx.Node, made: Any) -> None:
        """Note what a node stands for."""
        node.meta["val"] = made
        if isinstance(made, Tensor):
            self._nodes[id(made)] = made, node
            return
        for place, each in enumerate(made):
            self.keep(self.graph.call_function(operator.getitem, (node, place)), each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[func](*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if any(id(given) in self._nodes for given in pytree.tree_leaves((args, kwargs))):
            given = pytree.tree_map_only(Tensor, self.node, (args, kwargs or {}))
            self.keep(self.graph.call_function(func, *given), made)
        return made


def trace_part(
    name: str, part: nn.Module, inputs: Sequence[Tensor]
) -> tuple[Program, dict[str, str], dict[str, Tensor]]:
    """The program called `name` of the forward of a part that trains nothing; the names of its parameters and constants
    by those of the program's values; and the constants by their names.

    Inputs are in0, in1, ..., parameters after them, and results out0, out1, ... Parameters are on the meta device, and
    no others than tightfit's operators read them.
    """
    parameters = dict(part.named_parameters())
    given: dict[str, tuple[Tensor, TensorKind]] = {}
    for tensor in inputs:
        given[f"in{len(given)}"] = tensor, "activation" if tensor.is_floating_point() else "batch"
    names = {f"in{len(given) + number}": called for number, called in enumerate(parameters)}
    for value, called in names.items():
        given[value] = parameters[called], "weight" if parameters[called].dim() > 1 else "constant"
    recording = _Recording()
    for value, (tensor, _) in given.items():
        recording.keep(recording.graph.placeholder(value), tensor)
    with torch.no_grad(), recording:
        found = part(*inputs)
    made = list(found) if isinstance(found, tuple) else [found]
    recording.graph.output(tuple(map(recording.node, made)))
    given |= {value: (tensor, "constant") for value, tensor in recording.constants.items()}
    program = fold(
        recording.graph,
        name=name,
        inputs=[(value, kind) for value, (_, kind) in given.items()],
        results=[(f"out{number}", tensor.stride()) for number, tensor in enumerate(made)],
        forward=len(made),
    )
    return program, names | {value: value for value in recording.constants}, recording.constants
