"""Keeps the running statistics of batch normalisation in a trace: finds them among the buffers that a module changes,
and registers the operators of `tightfit.runtime.engine.cpu.batch_norm` with torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _NormBase

from tightfit.profiles.tracing.own_code import line_of_node
from tightfit.profiles.tracing.torch_ops import _define, _library, _registered
from tightfit.runtime.common.errors import InputError

aten = torch.ops.aten
STATISTICS = {3: 3, 4: 4}
"""output of PyTorch's functional batch norm that a running mean or variance becomes -> argument that it was"""

batch_norm = _define(
    "batch_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float momentum, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, w, b, mean, var, momentum, eps: (torch.empty_like(x), *(mean.new_empty(mean.shape) for _ in range(4))),
)
batch_norm_inference = _define(
    "batch_norm_inference",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps) -> Tensor",
    lambda x, w, b, mean, var, eps: (torch.empty_like(x),),
)
_library.define("keep_state(Tensor state, Tensor value) -> ()")
keep_state = _registered("keep_state", lambda state, value: None, lambda state, value: None)
fx.node.has_side_effect(keep_state)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, *_, ctx.eps = inputs
    ctx.save_for_backward(x, weight, *output[1:3])
    ctx.mark_non_differentiable(*output[1:])


def _grad(ctx: Any, dy: Tensor, *_: Any) -> Any:
    x, weight, mean, rstd = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = aten.native_batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, ctx.eps, wanted)
    return (
        *(gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True)),
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd("tightfit::batch_norm", _grad, setup_context=_setup, lib=_library)


def _without_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor | None, ...]:
    """As in `module.eval()`: normalises by the running statistics and makes no new ones."""
    return batch_norm_inference(x, weight, bias, mean, var, eps), None, None, None, None


EVALUATED: dict[Any, Callable[..., Any]] = {batch_norm: _without_batch, keep_state: lambda state, value: None}
"""What the operators are where no backward follows."""


def refuse_averages(module: nn.Module) -> None:
    """Raise InputError for running statistics that are means over all batches (momentum None): how far a batch counts
    would depend on the number of batches before it.
    """
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.training and part.track_running_stats and part.momentum is None:
            raise InputError(f"{name or type(module).__name__} has momentum=None; give a number, such as 0.1")


def keep_statistics(module: nn.Module, program: ExportedProgram) -> None:
    """Replace the batch norms of an exported module that change running statistics by `batch_norm`, each followed by
    `keep_state` of its statistics, likewise what counts their batches.

    Raises InputError for a buffer that is changed otherwise, or of which something else reads the values.
    """
    graph, changed = program.graph, program.graph_signature.buffers_to_mutate
    if not changed:
        return
    output = graph.output_node()
    results: list[Any] = list(output.args[0])
    buffers = program.graph_signature.inputs_to_buffers
    placeholders = {buffers[node.name]: node for node in graph.find_nodes(op="placeholder") if node.name in buffers}
    final_values = {node.name: node for node in results if isinstance(node, fx.Node)}
    for result, buffer in changed.items():
        chain = _chain(placeholders[buffer], final_values[result], output)
        if chain is None:
            raise InputError(
                f"{type(module).__name__} changes the buffer {buffer} in its forward{_line(final_values[result])}; of"
                " buffers that a step changes only the running statistics of batch normalisation are kept, and only"
                " where nothing else reads them. Leave the buffer as it is, or train this module with PyTorch"
            )
        for node in chain:
            node.replace_all_uses_with(placeholders[buffer], delete_user_cb=lambda user: user is not output)
            with graph.inserting_after(node):
                keep_node = graph.call_function(keep_state, (placeholders[buffer], node))
            keep_node.meta.update(node.meta, val=None)
    for node in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_functional.default):
        x, weight, bias, mean, var, training, momentum, eps = node.args
        assert training
        node.target, node.args = batch_norm, (x, weight, bias, mean, var, momentum, eps)


def _chain(buffer: fx.Node, last: fx.Node, output: fx.Node) -> list[fx.Node] | None:
    """The values that a buffer takes in turn, up to `last`, each made of the one before by a batch norm or by adding a
    number; None if there is another way, or another reader of one of them.
    """
    chain, node = [], last
    while node is not buffer:
        chain.append(node)
        before = _before(node)
        if before is None or len(chain) > len(buffer.graph.nodes):
            return None
        node = before
    chain.reverse()
    for value, follower in zip([buffer, *chain], [*chain, None], strict=True):
        maker = follower and (follower.args[0] if follower.target is operator.getitem else follower)
        if any(user is not maker and user is not output for user in value.users):
            return None
    return chain


def _before(node: fx.Node) -> Any:
    """The value of a buffer that `node` follows; None if it is made otherwise."""
    if node.target is aten.add.Tensor and isinstance(node.args[1], int):
        return node.args[0]
    if node.target is not operator.getitem or node.args[1] not in STATISTICS:
        return None
    maker = node.args[0]
    if not isinstance(maker, fx.Node) or maker.target is not aten._native_batch_norm_legit_functional.default:
        return None
    return maker.args[STATISTICS[node.args[1]]]  # type: ignore[index]


def _line(node: fx.Node) -> str:
    line = line_of_node(node)
    return f" at {line}" if line else ""
