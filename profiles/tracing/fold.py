"""Turns a traced joint graph (forward and backward) into a program: storages and operators, with views folded into
operands.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from tightfit.profiles.schema import Operand, Operator, Program, TensorKind, Value
from tightfit.profiles.tracing.inference import renamed
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.operators import STATE_COLUMNS
from tightfit.runtime.engine.training.job import KEEP_STATE

aten = torch.ops.aten

HEAD_CHUNK = "tightfit.head_chunk"
SLICED = {
    HEAD_CHUNK: (2,),
    "tightfit.projection": (1,),
    "tightfit.projection_backward": (1,),
    "tightfit.experts": (4, 5, 6, 7),
    "tightfit.experts_backward": (6, 7, 8, 9),
    "tightfit.adapted_experts": (4, 5, 6, 7),
    "tightfit.adapted_experts_backward": (6, 7, 8, 9),
}
"""operators that may read slices of the rows of frozen matrices, and the places of these arguments"""
ATTENTION = {"tightfit.attention": 2, "tightfit.attention_backward": 5}  # products of seq x seq x head_dim each
SCATTER = "aten.as_strided_scatter.default"
GATHERS = ("tightfit.embed_rows", "tightfit.head_rows")
ONCE = ("tightfit.table_rows", "tightfit.table_head")
"""operators that run once in a step: what they read is trained and may lie on disk between their forward and its
update, so that running them again would read it once more
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """What a placeholder of the whole module's graph stands for."""

    name: str
    kind: TensorKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class StridedWindow:
    """A tensor of the graph, described as a strided window on a storage."""

    storage: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def operand(self) -> dict[str, Any]:
        return {
            "operand": (
                Operand(
                    value=self.storage, size=list(self.size), stride=list(self.stride), offset=self.offset
                ).model_dump()
            )
        }


def fold(
    graph: fx.Graph,
    *,
    name: str,
    inputs: Sequence[tuple[str, TensorKind]],
    results: Sequence[tuple[str, Sequence[int]]],
    forward: int,
) -> Program:
    """The program that `graph` computes.

    `inputs` are the names and kinds of the placeholders, in order; `results` are the names of the outputs, in order,
    with the strides that other layers expect. The first `forward` results belong to the forward, the others to the
    backward. Raises InputError for an operator that writes in place or reinterprets a dtype.
    """
    return _Folder(graph, inputs, results, forward).program(name)


class _Folder:
    def __init__(
        self,
        graph: fx.Graph,
        inputs: Sequence[tuple[str, TensorKind]],
        results: Sequence[tuple[str, Sequence[int]]],
        forward: int,
    ) -> None:
        self.graph, self.inputs, self.results, self.forward = graph, inputs, results, forward
        self.passed = {result for result, _ in results[:forward]} | {
            f"grad_{name}" for name, k in inputs if k == "activation"
        }
        """Results that only other layers read, in whatever shape they see them."""
        self.values: dict[str, Value] = {}
        self.windows: dict[fx.Node, StridedWindow | list[StridedWindow | None]] = {}
        self.by_storage: dict[int, str] = {}
        self.starts: dict[str, int] = {}
        """Elements of a traced storage before the tensor that an operator made there: in a run it begins with the
        tensor.
        """
        self.gathered: set[str] = set()
        """Weights that rows are gathered from: of a head's, the slices are weights of their own."""
        self.operators: list[Operator] = []

    def program(self, name: str) -> Program:
        outputs = list(self.graph.output_node().args[0])  # type: ignore[arg-type]
        kept = [n for n in self.graph.nodes if str(n.target).removesuffix(".default") == KEEP_STATE]
        in_forward = _ancestors([n for n in outputs[: self.forward] if isinstance(n, fx.Node)] + kept)
        backward: list[Operator] = []
        placeholders = iter(self.inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                input_name, kind = next(placeholders)
                self._bind(node, node.meta["val"], input_name, kind)
            elif node.op == "get_attr":
                made = getattr(self.graph.owning_module, str(node.target), None)
                raise InputError(constant_made(list(getattr(made, "shape", [])), str(node.target)))
            elif node.target is operator.getitem:
                items = self.windows[node.args[0]]
                assert isinstance(items, list)
                item = items[node.args[1]]
                assert item is not None
                self.windows[node] = item
            elif node.op == "call_function":
                phase = "forward" if node in in_forward else "backward"
                made = self._call(node, phase)
                if made is not None:
                    (self.operators if phase == "forward" else backward).append(made)
        self._rename(outputs, backward)
        operators = [*self.operators, *backward]
        used = {n for op in operators for n in (*op.inputs, *op.outputs) if n}
        return Program(name=name, values=[v for v in self.values.values() if v.name in used], operators=operators)

    def _bind(self, node: fx.Node, tensor: torch.Tensor, name: str, kind: TensorKind) -> StridedWindow:
        storage, start = tensor.untyped_storage(), int(tensor.storage_offset())
        self.by_storage[storage._cdata], self.starts[name] = name, start
        self.values[name] = Value(
            name=name,
            shape=list(tensor.shape),
            stride=list(tensor.stride()),
            dtype=str(tensor.dtype).removeprefix("torch."),
            bytes=storage.nbytes() - start * tensor.element_size(),
            kind=kind,
        )
        window = StridedWindow(storage=name, size=tuple(tensor.shape), stride=tuple(tensor.stride()), offset=0)
        self.windows[node] = window
        return window

    def _call(self, node: fx.Node, phase: Any) -> Operator | None:
        """The operator of a node, or None if the node is only a view of an existing storage."""
        value, target = node.meta.get("val", ()), node.target  # keep_state has no output
        assert isinstance(target, torch._ops.OpOverload)
        if target._schema.is_mutable:
            raise InputError(
                f"the traced graph holds {target}, which writes in place; use the out-of-place form in the model"
            )
        if target.namespace not in ("aten", "tightfit"):
            raise InputError(
                f"operator {target} is not one of PyTorch, and the process that trains loads no other library; write it"
                " with PyTorch's operators, or as a torch.autograd.Function of them"
            )
        for tensor in [value] if isinstance(value, torch.Tensor) else value:
            if isinstance(tensor, torch.Tensor) and tensor.layout is not torch.strided:
                raise InputError(
                    f"{target} makes a {str(tensor.layout).removeprefix('torch.')} tensor; use dense tensors and"
                    " gradients (an embedding with sparse=False)"
                )
        if isinstance(value, torch.Tensor):
            alias = self._alias(node, value)
            if alias is not None:
                self.windows[node] = alias
                return None
        else:
            aliases = [self._alias(node, item) for item in value if isinstance(item, torch.Tensor)]
            if aliases and all(aliases):  # unbind, split and chunk return lists of views
                self.windows[node] = list(aliases)
                return None
        kind: TensorKind = "activation" if phase == "forward" else "gradient"
        tensors = [value] if isinstance(value, torch.Tensor) else list(value)
        fused = str(target).startswith("tightfit.")
        used_outputs = (
            set(range(len(tensors)))
            if fused or isinstance(value, torch.Tensor)
            else {u.args[1] for u in node.users if u.target is operator.getitem}
        )
        outputs: list[str | None] = []
        windows: list[StridedWindow | None] = []
        for index, tensor in enumerate(tensors):
            if index not in used_outputs or not isinstance(tensor, torch.Tensor):
                outputs.append(None)
                windows.append(None)
                continue
            output_name = node.name if len(tensors) == 1 else f"{node.name}.{index}"
            windows.append(self._bind(node, tensor, output_name, kind))
            outputs.append(output_name)
        self.windows[node] = windows[0] if isinstance(value, torch.Tensor) else windows  # type: ignore[assignment]
        inputs: dict[str, None] = {}
        name = str(target).removesuffix(".default") if fused else str(target)
        gathers = self._gathered(node, inputs) if name in GATHERS else []
        args = [*gathers, *(self._argument(a, inputs) for a in node.args[len(gathers) :])]
        if name == SCATTER:
            base = self.windows[node.args[0]]  # type: ignore[index]
            assert isinstance(base, StridedWindow)
            args[4:] = [base.offset if len(args) < 5 or args[4] is None else args[4] - self.starts[base.storage]]
        for place in SLICED.get(name, ()):
            matrix = node.args[place]
            if isinstance(matrix, fx.Node) and (name == HEAD_CHUNK or self._is_slice(matrix)):
                args[place] = self._slice(matrix, inputs)
        return Operator(
            target=name,
            phase=phase,
            args=args,
            kwargs={k: self._argument(v, inputs) for k, v in node.kwargs.items()},
            inputs=list(inputs),
            outputs=outputs,
            recomputable=torch.Tag.nondeterministic_seeded not in target.tags and name not in (*ONCE, KEEP_STATE),
            gathers=[args[0]["operand"]["value"]] if name in GATHERS else [],
            flops=_flops(node),
        )

    def _alias(self, node: fx.Node, tensor: torch.Tensor) -> StridedWindow | None:
        """The window on an existing storage that `tensor` is a view of; None if it has a storage of its own."""
        storage = self.by_storage.get(tensor.untyped_storage()._cdata)
        if storage is None:
            return None
        if str(tensor.dtype) != f"torch.{self.values[storage].dtype}":
            raise InputError(
                f"{node.target} views {self.values[storage].dtype} as {tensor.dtype}; convert instead of reinterpreting"
            )
        offset = int(tensor.storage_offset()) - self.starts[storage]
        if offset < 0:
            raise InputError(f"{node.target} looks at what lies before a tensor in its storage; index the whole tensor")
        return StridedWindow(storage=storage, size=tuple(tensor.shape), stride=tuple(tensor.stride()), offset=offset)

    def _is_slice(self, node: fx.Node) -> bool:
        """Whether the node is some of the rows of a frozen matrix."""
        window = self.windows[node]
        assert isinstance(window, StridedWindow)
        whole = self.values[window.storage]
        return whole.kind == "weight" and window.size[0] < whole.shape[0]

    def _slice(self, node: fx.Node, inputs: dict[str, None]) -> dict[str, Any]:
        """The operand for a slice of the rows of a frozen matrix, which becomes a weight of its own, ``name[a:b]``."""
        window = self.windows[node]
        assert isinstance(window, StridedWindow)
        weight = self.values[window.storage]
        width = weight.shape[1]
        start, rows = window.offset // width, math.prod(window.size) // width
        name = f"{window.storage}[{start}:{start + rows}]"
        size = node.meta["val"].numel() * node.meta["val"].element_size()
        self.values[name] = weight.model_copy(update={"name": name, "shape": [rows, width], "bytes": size})
        order = [name if n == window.storage else n for n in inputs]
        inputs.clear()
        inputs.update(dict.fromkeys(order))
        return StridedWindow(storage=name, size=window.size, stride=window.stride, offset=0).operand()

    def _argument(self, argument: Any, inputs: dict[str, None]) -> Any:
        if isinstance(argument, fx.Node):
            window = self.windows[argument]
            assert isinstance(window, StridedWindow)
            inputs[window.storage] = None
            if window.storage in self.gathered:
                return self._slice(argument, inputs)
            return window.operand()
        if isinstance(argument, (list, tuple)):
            return [self._argument(a, inputs) for a in argument]
        if isinstance(argument, float) and not math.isfinite(argument):
            return {"float": str(argument)}
        for key, kind in (("dtype", torch.dtype), ("memory_format", torch.memory_format), ("layout", torch.layout)):
            if isinstance(argument, kind):
                return {key: str(argument).removeprefix("torch.")}
        if isinstance(argument, torch.device):
            return {"device": str(argument)}
        if argument is None or isinstance(argument, (bool, int, float, str)):
            return argument
        raise InputError(
            f"an argument of type {type(argument).__name__} ({argument!r}) cannot be written into a profile"
        )

    def _gathered(self, node: fx.Node, inputs: dict[str, None]) -> list[Any]:
        """The first argument of an operator that gathers rows: the whole weight, which stays in the store."""
        window = self.windows[node.args[0]]  # type: ignore[index]
        assert isinstance(window, StridedWindow)
        inputs[window.storage] = None
        self.gathered.add(window.storage)
        return [window.operand()]

    def _rename(self, outputs: list[Any], backward: list[Operator]) -> None:
        """Give results their agreed names.

        A result that is an input, a view, of another layout, or shares another result's storage is copied.
        """
        names: dict[str, str] = {}
        input_names = {name for name, _ in self.inputs}
        for index, ((result, stride), node) in enumerate(zip(self.results, outputs, strict=True)):
            if node is None:
                continue
            window = self.windows[node]
            assert isinstance(window, StridedWindow)
            value = self.values[window.storage]
            is_whole = (
                window.offset == 0
                and list(window.size) == value.shape
                and list(window.stride) == value.stride == list(stride)
            ) or (result in self.passed and _same_bytes(window, value, stride))
            if is_whole and window.storage not in input_names and window.storage not in names:
                names[window.storage] = result
                continue
            tensor = node.meta["val"]
            copy_name = f"copy_of_{result}"
            self.values[copy_name] = Value(
                name=copy_name,
                shape=list(tensor.shape),
                stride=list(stride),
                dtype=value.dtype,
                bytes=tensor.numel() * tensor.element_size(),
                kind="activation" if index < self.forward else "gradient",
            )
            copy = Operator(
                target="tightfit.copy",
                phase="forward" if index < self.forward else "backward",
                args=[window.operand()],
                inputs=[window.storage],
                outputs=[copy_name],
            )
            (self.operators if index < self.forward else backward).append(copy)
            names[copy_name] = result

        def rename(name: str) -> str:
            return names.get(name, name)

        self.values = {rename(v.name): v.model_copy(update={"name": rename(v.name)}) for v in self.values.values()}
        for group in (self.operators, backward):
            group[:] = [renamed(op, names) for op in group]


def constant_made(shape: Sequence[int], name: str) -> str:
    """What is wrong with a tensor that a forward makes of values that are none of its operators' results, and what to
    do.
    """
    return (
        f"forward makes a tensor of shape {list(shape)} ({name}) of numbers of its own. If they are the same in every"
        " step, make it in __init__ and register it as a buffer; if not, hand it over as a tensor of the batch"
    )


def _same_bytes(window: StridedWindow, value: Value, stride: Sequence[int]) -> bool:
    """Whether a window is the whole of a matrix or a larger tensor, seen with another shape."""
    return (
        window.offset == 0
        and min(len(window.size), len(value.shape)) > 1
        and window.stride == tuple(stride) == _contiguous(window.size)
        and tuple(value.stride) == _contiguous(value.shape)
        and math.prod(window.size) == math.prod(value.shape)
    )


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _flops(node: fx.Node) -> float:
    """FLOPs of a node, two per multiply-add. Source: torch.utils.flop_counter, except for tightfit's own operators.

    The loss head takes two products per slice, one without the gradient; attention takes two, its backward five.
    """
    if str(node.target).startswith(HEAD_CHUNK):
        state, hidden, weight = (argument.meta["val"] for argument in node.args[:3])  # type: ignore[union-attr]
        return float((2 if state.shape[1] == STATE_COLUMNS else 4) * hidden.shape[0] * weight.numel())
    products = ATTENTION.get(str(node.target).removesuffix(".default"))
    if products is not None:
        queries, seq = node.args[products // 5].meta["val"], node.args[6 if products == 5 else 3].meta["val"].shape[0]  # type: ignore[union-attr]
        return float(2 * products * queries.numel() * seq) / 2  # the causal mask leaves half of the scores out
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in flop_registry:
        return 0.0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return float(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))
