"""Traces a module on a sample batch into layers and programs of operators.

1. `torch.export` traces the whole forward under fake tensors: no weight is needed, and none is made.
2. The graph is cut into segments by module stack: each repeated block is a layer, and so is each stretch between
   blocks.
3. Segments that are equal up to names share one program: their forward and backward traced together by `make_fx`
   through `torch.autograd.grad`, views folded into strided operands (`tightfit.profiles.tracing.fold`).
4. Gradients that several layers contribute to are summed by small layers of their own.
"""

from __future__ import annotations

import dataclasses
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.utils.rnn import PackedSequence

from tightfit.profiles.schema import Layer, Operand, Operator, Program, TensorKind, Value
from tightfit.profiles.tracing.batch_norm_ops import EVALUATED, keep_statistics, refuse_averages
from tightfit.profiles.tracing.eager_steps import EagerSteps, StepError, refuse_changed
from tightfit.profiles.tracing.evaluation import in_eval_mode, with_evaluations
from tightfit.profiles.tracing.fewer_saved import save_less
from tightfit.profiles.tracing.fold import Role, constant_made, fold
from tightfit.profiles.tracing.gradient_fusion import fuse_products
from tightfit.profiles.tracing.inference import with_inference
from tightfit.profiles.tracing.loss_function import loss_maker
from tightfit.profiles.tracing.own_code import line_of_error, line_of_node, quiet_torch
from tightfit.profiles.tracing.own_draws import draws_watched, seeding_refused
from tightfit.profiles.tracing.own_dropout import dropout_traced, number_dropouts
from tightfit.profiles.tracing.own_gradients import CustomFunctions, DetachWithoutGrad, gradients_refused, refuse_hooks
from tightfit.profiles.tracing.own_state import code_run
from tightfit.profiles.tracing.segments import Segment, connect, cut, kind_of, signature, single_operators
from tightfit.profiles.tracing.tile_sums import fuse_sums, sums_in_place
from tightfit.profiles.tracing.tiles import in_tiles
from tightfit.profiles.tracing.traced import Trace, global_tensors
from tightfit.profiles.tracing.unchecked import compile_off, unchecked
from tightfit.runtime.common.errors import InputError, TightfitError
from tightfit.runtime.common.progress import Progress

aten = torch.ops.aten
_COPIES: dict[Any, Callable[..., Any]] = {
    aten.view_as_real.default: aten.view_as_real_copy.default,
    aten.view_as_complex.default: aten.view_as_complex_copy.default,
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
}
"""views that see other numbers than those which lie in memory -> what makes these numbers"""


def trace(
    module: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    decompositions: dict[Any, Callable[..., Any]] | None = None,
    inference: dict[Any, Callable[..., Any]] | None = None,
    progress: Progress | None = None,
    tiles: int = 1,
    evaluated: bool = False,
) -> Trace:
    """Trace `module(*batch)`, whose first result is the scalar loss and whose second, if any, the token losses.

    Trained parameters and the loss are float32; operators get parameters in the type that the module has them in.
    Operators in `decompositions` are decomposed; where no backward follows, `inference` takes precedence. Parameters
    that require no gradient are frozen: matrices become weights, vectors constants. The module calls each repeated
    block `tiles` times, one call after the other, on a part of the batch each. With `evaluated` it is traced in eval
    mode, too, for what its layers do in an evaluation; without, that is their forward without dropout. Raises
    InputError if the module cannot be traced, or changes a buffer that is no running statistic.
    """
    batch = {name: tensor.contiguous() for name, tensor in batch.items()}  # as a run writes it
    report = progress or (lambda stage, done, total: None)
    report("export", 0, 1)
    with code_run() as code:
        graph, roles = _export(module, batch)
    report("export", 1, 1)
    _check_results(graph, loss_maker(module))
    _widen_loss(graph)
    segments, other_evaluation = cut(graph, tiles), None
    if evaluated and _reads_mode(graph, code):
        try:
            segments, evaluated_roles = _evaluated(module, batch, graph, roles, segments)
            roles |= evaluated_roles
        except InputError as error:
            other_evaluation = f"in eval mode: {error}"
    number_dropouts(segment.nodes for segment in segments)

    def traced(pieces: list[Segment], visited: Callable[[Segment], None]) -> _Tracer:
        """Trace the segments `pieces`, calling `visited` with each one before its forward and before its backward is
        traced.
        """
        connect(graph, pieces)
        tracer = _Tracer(
            roles=roles,
            fake_mode=FakeTensorMode(),
            decompositions=decompositions or {},
            inference=(inference or {}) | EVALUATED,
            tiles=tiles,
            requires={node: role.kind == "trainable" for node, role in roles.items()},
        )
        for piece in pieces:
            visited(piece)
            tracer.forward(piece)
        if not tracer.requires[graph.output_node().all_input_nodes[0]]:
            raise InputError("the loss depends on no parameter that requires a gradient; there is nothing to train")
        for done, piece in enumerate(reversed(pieces)):
            report("programs", done, len(pieces))
            visited(piece)
            tracer.backward(piece, graph)
        return tracer

    try:
        tracer = traced(segments, lambda segment: None)
    except Exception as error:
        line = line_of_error(error)
        if line is None:
            # Trace operator by operator: the last one begun is the one that cannot be traced.
            visited: list[Segment] = []
            try:
                traced(single_operators(graph), visited.append)
            except Exception:
                line = line_of_node(visited[-1].nodes[0]) if visited else None
        if line is None and isinstance(error, TightfitError):
            raise
        raise InputError(f"{type(module).__name__} cannot be traced{_at(line)}: {_reason(error)}") from error
    report("programs", len(segments), len(segments))
    return dataclasses.replace(tracer.finish(graph, segments), code=code, other_evaluation=other_evaluation)


def _reads_mode(graph: fx.Graph, code: Iterable[types.CodeType]) -> bool:
    """Whether a module may do something else in eval mode that its graph does not show: `code` of its own names the
    mode, or something is drawn, but for dropout.
    """
    names = (name for one in code for name in (*one.co_names, *one.co_consts))
    return any(name == "training" for name in names) or any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in graph.nodes
    )


def _evaluated(
    module: nn.Module,
    batch: Mapping[str, torch.Tensor],
    graph: fx.Graph,
    roles: Mapping[fx.Node, Role],
    segments: list[Segment],
) -> tuple[list[Segment], dict[fx.Node, Role]]:
    """`segments` with what they do in eval mode, and the roles of what that reads. Raises InputError where it cannot be
    had.
    """
    with in_eval_mode(module):
        evaluated, evaluated_roles = _export(module, batch)
        _check_results(evaluated, loss_maker(module))
    _widen_loss(evaluated)
    found = with_evaluations(graph, roles, segments, evaluated, evaluated_roles)
    if found is None:
        raise InputError(f"{type(module).__name__} uses other parameters in eval mode than where it is trained")
    return found, evaluated_roles


def _at(line: str | None) -> str:
    return f" at {line}" if line else ""


def _reason(error: Exception) -> str:
    """Why something cannot be traced, in one line."""
    if isinstance(error, TightfitError):
        return str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(isinstance(value, PackedSequence) for frame in frames for value in frame.f_locals.values()):
        return (
            "a packed sequence has a shape that follows from the lengths, and a traced step has fixed shapes; give the"
            " recurrent layer the whole padded sequences, and take the last output of each (gather at lengths - 1) or"
            " weight those past the end by zero"
        )
    if isinstance(error, (DynamicOutputShapeException, DataDependentOutputException, GuardOnDataDependentSymNode)):
        operator = getattr(error, "func", "a condition")
        if "_ctc_loss" in str(operator):
            return (
                f"the loss of CTC reads lengths and labels ({operator}), and a traced step does not branch on values;"
                " write its recursion over time in tensor operations (torch.logaddexp, torch.where by the lengths), or"
                " train this module with PyTorch"
            )
        return (
            f"what follows depends on the values of tensors ({operator}); a traced step has fixed shapes and no"
            " branches on values"
        )
    if isinstance(error, AssertionError) and "Please convert all Tensors to FakeTensors" in str(error):
        return "it uses a tensor that it was not given; hand it over as an argument"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _export(module: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[fx.Graph, dict[fx.Node, Role]]:
    refuse_hooks(module)
    refuse_averages(module)
    functions = CustomFunctions()
    with warnings.catch_warnings(), quiet_torch():
        warnings.simplefilter("ignore")  # deprecation warnings of torch about its own export
        try:
            with (
                functions.recorded(),
                gradients_refused(),
                seeding_refused(),
                unchecked(),
                compile_off(),
                dropout_traced(),
                DetachWithoutGrad(),
                draws_watched() as drawn,
            ):
                program = torch.export.export(module, tuple(batch.values()), strict=False)
            program = program.run_decompositions({})
        except TightfitError:
            raise
        except Exception as error:
            _refuse_unfollowed(module, batch)
            raise InputError(
                f"{type(module).__name__} cannot be traced by torch.export{_at(line_of_error(error))}: {_reason(error)}"
            ) from error
    changed = program.graph_signature.parameters_to_mutate
    line = next((_at(line_of_node(node)) for node in program.graph.nodes if node.name in changed), "")
    refuse_changed(module, list(dict.fromkeys(changed.values())), line)
    if drawn:  # torch.export may have drawn numbers itself
        _refuse_unfollowed(module, batch)
    functions.restore(program.graph)
    _open_complex_scatters(program.graph)
    _open_copies(program.graph)
    _open_constants(program)
    _drop_empty_parts(program.graph)
    _free_layouts(program.graph)
    keep_statistics(module, program)
    signature = program.graph_signature
    # What the forward changes of its buffers and of its batch comes before what it returns.
    output = program.graph.output_node()
    returned = zip(signature.output_specs, output.args[0], strict=True)
    output.args = (tuple(node for spec, node in returned if spec.kind is OutputKind.USER_OUTPUT),)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state_tensors = parameters | dict(module.named_buffers(remove_duplicate=False))
    first_nodes: dict[int, fx.Node] = {}
    roles: dict[fx.Node, Role] = {}
    names_of_batch = iter(batch)
    constants = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in signature.inputs_to_parameters:
            name = signature.inputs_to_parameters[node.name]
            kind: TensorKind = (
                "trainable"
                if parameters[name].requires_grad
                else "weight"
                if parameters[name].dim() > 1
                else "constant"
            )
        elif node.name in constants:
            name, kind = constants[node.name], "constant"
            if name not in state_tensors and node.users:
                _refuse_unfollowed(module, batch)
                raise InputError(
                    f"{type(module).__name__} cannot be traced{_at(line_of_node(next(iter(node.users))))}:"
                    f" {constant_made(list(node.meta['val'].shape), name)}"
                )
        else:
            name, kind = next(names_of_batch, node.name), "batch"
            if not isinstance(node.meta["val"], torch.Tensor):
                raise InputError(
                    f"{type(module).__name__} uses an object in its forward that a trace cannot hold ({node.name}),"
                    " such as a torch.Generator of its own; draw from PyTorch's, without the argument generator"
                )
        if kind != "batch" and name in state_tensors:
            first = first_nodes.setdefault(id(state_tensors[name]), node)
            if first is not node:  # a tensor that several modules share keeps its first name and has one gradient
                node.replace_all_uses_with(first)
                continue
        roles[node] = Role(name=name, kind=kind)
    for node, role in roles.items():
        if role.kind == "trainable":
            _keep_wide(program.graph, node)
    return program.graph, roles


def _keep_wide(graph: fx.Graph, parameter: fx.Node) -> None:
    """Make a trained parameter float32, which is rounded to the type that the module has it in wherever it is used:
    what an update adds is often too small for a bfloat16.
    """
    narrow = parameter.meta["val"]
    if narrow.dtype is torch.float32:
        return
    for user in list(parameter.users):
        with graph.inserting_before(user):
            rounded = graph.call_function(aten._to_copy.default, (parameter,), {"dtype": narrow.dtype})
        rounded.meta.update(user.meta, val=narrow)
        user.replace_input_with(parameter, rounded)
    with narrow.fake_mode:
        parameter.meta["val"] = narrow.float()


def _widen_loss(graph: fx.Graph) -> None:
    """Make the loss float32."""
    output = graph.output_node()
    loss, *others = output.all_input_nodes
    value = loss.meta["val"]
    if value.dtype is torch.float32 or not value.is_floating_point():
        return
    with graph.inserting_before(output):
        widened = graph.call_function(aten._to_copy.default, (loss,), {"dtype": torch.float32})
    with value.fake_mode:
        widened.meta.update(loss.meta, val=value.float())
    output.args = ((widened, *others),)


def _open_copies(graph: fx.Graph) -> None:
    """Replace ``aten.copy``, which assignments to parts of tensors become and which has no derivative, by what it
    copies.
    """
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        target_value, source = (argument.meta["val"] for argument in node.args[:2])
        copied = node.args[1]
        with graph.inserting_before(node):
            for target, arguments, keywords, differs in (
                (aten._to_copy.default, (), {"dtype": target_value.dtype}, source.dtype != target_value.dtype),
                (aten.expand.default, (list(target_value.shape),), {}, source.shape != target_value.shape),
            ):
                if differs:
                    copied = graph.call_function(target, (copied, *arguments), keywords)
                    copied.meta.update(node.meta)
        node.replace_all_uses_with(copied)
        graph.erase_node(node)


def _open_complex_scatters(graph: fx.Graph) -> None:
    """Replace ``aten.slice_scatter`` of complex numbers, which assignments to slices become and which has no derivative
    for them, by a concatenation.
    """
    for node in graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        base, part = node.args[:2]
        dim, start, end, step = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]][2:]
        value = node.meta["val"]
        if not value.is_complex() or step != 1:
            continue
        size = value.shape[dim]
        start, end, _ = slice(start, end).indices(size)
        end = max(start, end)
        pieces = [part]
        with graph.inserting_before(node), value.fake_mode:
            for first, last in ((0, start), (end, size)):
                if first == last:
                    continue
                piece = graph.call_function(aten.slice.Tensor, (base, dim, first, last))
                piece.meta.update(node.meta, val=value.narrow(dim, first, last - first))
                pieces.insert(0 if last == start else len(pieces), piece)
            joined = graph.call_function(aten.cat.default, (pieces, dim))
        joined.meta.update(node.meta)
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def _open_constants(program: torch.export.ExportedProgram) -> None:
    """Replace constants of one integer, which lists as indices become, by an operator that makes them where they are
    used.
    """
    for node in program.graph.find_nodes(op="placeholder"):
        value = program.constants.get(program.graph_signature.inputs_to_lifted_tensor_constants.get(node.name, ""))
        if value is None or isinstance(value, FakeTensor) or value.numel() != 1 or value.is_floating_point():
            continue
        for user in list(node.users):
            with program.graph.inserting_before(user):
                constant = program.graph.call_function(
                    aten.full.default, (list(value.shape), value.item()), {"dtype": value.dtype}
                )
            constant.meta.update(user.meta, val=node.meta["val"])
            user.replace_input_with(node, constant)


def _drop_empty_parts(graph: fx.Graph) -> None:
    """Replace what one tensor appended to an empty one makes, as caches begin, by that tensor."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        empty = [piece for piece in node.args[0] if piece.meta["val"].shape == (0,)]
        others = [piece for piece in node.args[0] if piece not in empty]
        if not empty or len(others) != 1 or others[0].meta["val"].dtype != node.meta["val"].dtype:
            continue
        node.replace_all_uses_with(others[0])
        _erase_unused(node)


def _erase_unused(node: fx.Node) -> None:
    """Erase a node that nothing uses, and what nothing else uses of what it was made of."""
    if node.op == "call_function" and not node.users:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _erase_unused(source)


def _free_layouts(graph: fx.Graph) -> None:
    """Have views copy where they must: torch.export traces without gradients, and an operator that needs them may have
    another kernel, whose results lie otherwise in memory (attention whose bias is trained).
    """
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


def _refuse_unfollowed(module: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError if the module fails untraced, or is one that no traced step can follow."""
    if any(isinstance(parameter, FakeTensor) for parameter in module.parameters()):
        return
    name, sample = type(module).__name__, tuple(batch.values())
    try:
        EagerSteps(name, module, sample, gradients=False).take()
    except StepError:  # some forwards need a gradient to be recorded
        EagerSteps(name, module, sample).take()


def _check_results(graph: fx.Graph, maker: str) -> None:
    """Raise InputError, which names its `maker`, unless the first result is a scalar loss and the second, if any, holds
    the token losses.
    """
    results = [node.meta["val"] for node in graph.output_node().all_input_nodes]
    if not results:
        raise InputError(f"{maker} must return one scalar loss, and returns no tensor")
    if results[0].numel() != 1:
        raise InputError(
            f"{maker} must return one scalar loss, not a tensor of shape {list(results[0].shape)}; take its mean or sum"
        )
    if len(results) > 2 or (len(results) == 2 and not results[1].dim()):
        raise InputError(
            f"{maker} must return one scalar loss, not {len(results)} results; add up losses that belong together"
        )


def _writes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@dataclasses.dataclass(kw_only=True)
class _Tracer:
    roles: dict[fx.Node, Role]
    fake_mode: FakeTensorMode
    decompositions: dict[Any, Callable[..., Any]]
    inference: dict[Any, Callable[..., Any]]
    requires: dict[fx.Node, bool]
    tiles: int = 1
    programs: dict[str, Program] = dataclasses.field(default_factory=dict)
    layers: dict[str, Layer] = dataclasses.field(default_factory=dict)
    partials: dict[fx.Node, list[tuple[Segment, str]]] = dataclasses.field(default_factory=dict)
    """Gradients that segments contribute to a node's result, in backward order: (segment that reads it, global
    name)."""
    names: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    flags: dict[str, list[bool]] = dataclasses.field(default_factory=dict)

    def forward(self, segment: Segment) -> None:
        """Name the segment's outputs and find out which of them carry a gradient."""
        for index, node in enumerate(segment.outputs):
            self.names[node] = f"{segment.name}/out{index}"
        key = self._signature(segment, ())
        if key not in self.flags:
            assert segment.module is not None
            with self.fake_mode, torch.enable_grad():
                results = segment.module(*self._fakes(segment))
            self.flags[key] = [r.requires_grad for r in results]
        segment.differentiable = self.flags[key]
        for node, flag in zip(segment.outputs, segment.differentiable, strict=True):
            self.requires[node] = flag

    def backward(self, segment: Segment, graph: fx.Graph) -> None:
        """Trace the segment's program, unless an equal one is known, and bind the segment to it."""
        loss = graph.output_node().all_input_nodes[0]
        incoming = tuple(
            flag and (node is loss or bool(self.partials.get(node)))
            for node, flag in zip(segment.outputs, segment.differentiable, strict=True)
        )
        seeds = tuple(node is loss for node in segment.outputs)
        evaluation = segment.evaluation
        key = self._signature(segment, (incoming, seeds, evaluation and evaluation.text))
        if key not in self.programs:
            self.programs[key] = self._program(segment, incoming, seeds, f"program{len(self.programs)}")
        program = self.programs[key]
        present = {value.name for value in program.values}
        bindings: dict[str, str] = {}
        for index, node in enumerate(segment.inputs):
            bindings[f"in{index}"] = self._global(node)
            if self.requires[node] and f"grad_in{index}" in present:
                name = f"grad:{self._global(node)}"
                self.partials.setdefault(node, []).append((segment, name))
                bindings[f"grad_in{index}"] = name
        if evaluation:
            bindings |= {name: self._global(node) for name, _, node in evaluation.inputs if name not in bindings}
        for index, node in enumerate(segment.outputs):
            bindings[f"out{index}"] = self._global(node)
            if incoming[index] and node is not loss:
                bindings[f"grad_out{index}"] = f"grad:{self._global(node)}"
        for value in program.values:  # slices of a weight are global tensors of their own
            if "[" in value.name:
                base, rows = value.name.split("[")
                bindings[value.name] = f"{bindings[base]}[{rows}"
        self.layers[segment.name] = Layer(
            name=segment.name, program=program.name, bindings={k: v for k, v in bindings.items() if k in present}
        )

    def _program(self, segment: Segment, incoming: tuple[bool, ...], seeds: tuple[bool, ...], name: str) -> Program:
        assert segment.module is not None
        module = segment.module
        inputs = self._fakes(segment)
        wanted = [index for index, node in enumerate(segment.inputs) if self.requires[node]]
        tangents = [index for index, flag in enumerate(incoming) if flag and not seeds[index]]
        with self.fake_mode:
            seeds_in = [_empty_like(segment.outputs[i].meta["val"]) for i in tangents]

        def joint(*args: torch.Tensor) -> list[Any]:
            primals, given = args[: len(inputs)], iter(args[len(inputs) :])
            outputs = module(*primals)
            roots = [(o, None if seeds[i] else next(given)) for i, o in enumerate(outputs) if incoming[i]]
            gradients: tuple[Any, ...] = ()
            if roots and wanted:
                gradients = torch.autograd.grad(
                    [r for r, _ in roots], [primals[i] for i in wanted], [g for _, g in roots], allow_unused=True
                )
            return [*outputs, *gradients]

        traced = self._traced(joint, self.decompositions, [*inputs, *seeds_in])
        fuse_products(traced)
        fuse_sums(traced)
        save_less(traced, len(segment.outputs), self.fake_mode)
        outputs = [(f"out{i}", node.meta["val"].stride()) for i, node in enumerate(segment.outputs)]
        results = list(outputs)
        if any(incoming) and wanted:  # a gradient has the layout of its tensor
            results += [(f"grad_in{i}", segment.inputs[i].meta["val"].stride()) for i in wanted]
        primals = [(f"in{i}", kind_of(node, self.roles)) for i, node in enumerate(segment.inputs)]
        given = [*primals, *((f"grad_out{i}", "gradient") for i in tangents)]
        program = fold(traced, name=name, inputs=given, results=results, forward=len(outputs))
        program = sums_in_place(program, [result for result, _ in results])
        program = in_tiles(program, self.tiles)
        if segment.evaluation is not None:
            module = segment.evaluation.module
            primals = [(name, kind) for name, kind, _ in segment.evaluation.inputs]
            with self.fake_mode:
                inputs = [_empty_like(node.meta["val"]) for *_, node in segment.evaluation.inputs]
        elif not any(node.target in self.inference for node in module.graph.nodes):
            return program
        with torch.no_grad():
            inference_graph = self._traced(module, self.decompositions | self.inference, inputs)
        inference_program = fold(inference_graph, name=name, inputs=primals, results=outputs, forward=len(outputs))
        return with_inference(program, inference_program, [result for result, _ in outputs])

    def _traced(
        self, call: Callable[..., Any], decompositions: dict[Any, Callable[..., Any]], inputs: list[torch.Tensor]
    ) -> fx.Graph:
        decompositions = _COPIES | decompositions
        with self.fake_mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = make_fx(call, decomposition_table=decompositions, tracing_mode="real")(*inputs)
            if any(node.target is aten.mkldnn_rnn_layer.default for node in traced.graph.nodes):
                # mkldnn's backward leaves out results and needs a workspace whose size is known only at run time.
                with torch.backends.mkldnn.flags(enabled=False):
                    traced = make_fx(call, decomposition_table=decompositions, tracing_mode="real")(*inputs)
            if any(_writes_in_place(node) for node in traced.graph.nodes):  # make them functional
                with torch.no_grad():
                    traced = make_fx(torch.func.functionalize(traced))(*(tensor.detach() for tensor in inputs))
        traced.graph.eliminate_dead_code()
        return traced.graph

    def _fakes(self, segment: Segment) -> list[torch.Tensor]:
        with self.fake_mode:
            fakes = []
            for node in segment.inputs:
                fakes.append(_empty_like(node.meta["val"]).requires_grad_(self.requires[node]))
            return fakes

    def _signature(self, segment: Segment, extra: tuple[Any, ...]) -> str:
        return signature(segment, lambda node: (self.requires[node], kind_of(node, self.roles)), extra)

    def _global(self, node: fx.Node) -> str:
        return self.roles[node].name if node in self.roles else self.names[node]

    def finish(self, graph: fx.Graph, segments: list[Segment]) -> Trace:
        programs = sorted(self.programs.values(), key=lambda p: int(p.name.removeprefix("program")))
        by_name = {p.name: p for p in programs}
        layers = [self.layers[segment.name] for segment in segments]
        layers, sums = self._accumulate(layers, segments, by_name)
        programs += sums
        by_name |= {p.name: p for p in sums}
        tensors = global_tensors(layers, by_name)
        results = [self._global(node) for node in graph.output_node().all_input_nodes]
        return Trace(
            tensors=tensors,
            programs=programs,
            layers=layers,
            loss=results[0],
            token_losses=results[1] if len(results) > 1 else None,
        )

    def _accumulate(
        self, layers: list[Layer], segments: list[Segment], by_name: dict[str, Program]
    ) -> tuple[list[Layer], list[Program]]:
        """For each gradient that several layers contribute to: rename the contributions and add layers that sum them,
        one contribution after the other.

        A new layer precedes, in forward order, a layer that reads the tensor, so it runs right after that layer's
        backward.
        """
        position = {segment.name: index for index, segment in enumerate(segments)}
        before: dict[int, list[Layer]] = {}
        sums: dict[tuple[Any, ...], Program] = {}
        for partials in self.partials.values():
            if len(partials) < 2:
                continue
            total = partials[0][1]
            so_far = ""
            for index, (segment, _) in enumerate(partials):
                layer = layers[position[segment.name]]
                (local,) = [k for k, v in layer.bindings.items() if v == total and k.startswith("grad_in")]
                value = next(v for v in by_name[layer.program].values if v.name == local)
                partial = f"{total}@{segment.name}"
                layers[position[segment.name]] = layer.model_copy(
                    update={"bindings": {**layer.bindings, local: partial}}
                )
                if not index:
                    so_far = partial
                    continue
                last = index == len(partials) - 1
                sum_name = total if last else f"{total}#{index}"
                shape = (tuple(value.shape), tuple(value.stride), value.dtype)
                if shape not in sums:
                    sums[shape] = _sum_program(f"sum{len(sums)}", value)
                name = f"sum({total})" if last else f"sum({total})#{index}"
                bindings = {"part0": so_far, "part1": partial, "total": sum_name}
                sum_layer = Layer(name=name, program=sums[shape].name, bindings=bindings)
                before.setdefault(position[segment.name], []).append(sum_layer)
                so_far = sum_name
        ordered = [layer for index, follower in enumerate(layers) for layer in [*before.get(index, []), follower]]
        return ordered, list(sums.values())


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """`torch.empty_like` that also works on tensors of another fake mode, which torch's refuses."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _sum_program(name: str, like: Value) -> Program:
    """The program of a layer that adds two contributions to the gradient of `like`."""

    def operand(value: str) -> dict[str, Any]:
        return {"operand": Operand(value=value, size=like.shape, stride=like.stride).model_dump()}

    parts = ["part0", "part1"]
    operator = Operator(
        target="aten.add.Tensor",
        phase="backward",
        args=[operand(part) for part in parts],
        inputs=parts,
        outputs=["total"],
    )
    values = [like.model_copy(update={"name": value_name, "kind": "gradient"}) for value_name in (*parts, "total")]
    return Program(name=name, values=values, operators=[operator])
