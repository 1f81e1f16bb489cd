"""Compiles the operators of a program into calls with slots for their tensors.

A tensor argument is a strided view of a storage. An aten operator writes straight into its output's storage if the
device has a form of it that does (`Kernels.direct`), or if it has an out variant with a kernel of the device's own, and
if that kernel writes nowhere else; `tightfit.profiles.measuring.guard` tests that, and the profile marks operators that
fail (`copied`). Otherwise the result is copied into the output, and the transient result counts as workspace: the
profile times and measures operators through this very module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.device.device import Kernels

COPIES = ("aten::clone", "aten::_to_copy")  # run as `copy_`: the output's dtype and strides replace their options
Outputs = list[Tensor | None]


class CompiledOperator:
    """One operator; `call(outputs)` runs it on the tensors that were put into its slots."""

    __slots__ = ("args", "call", "functional", "gathers", "kwargs", "name", "outputs", "partial", "slots")

    def __init__(self, operator: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]], kernels: Kernels) -> None:
        self.name: str = operator["target"]
        self.args: list[Any] = []
        self.kwargs: dict[str, Any] = {}
        self.slots: list[tuple[Any, Any, dict[str, Any]]] = []
        """Container, key and operand of every tensor argument, in order."""
        for argument in operator["args"]:
            self.args.append(None)
            self._place(argument, self.args, len(self.args) - 1)
        for key, argument in operator.get("kwargs", {}).items():
            self._place(argument, self.kwargs, key)
        gathered = set(operator.get("gathers", ()))
        self.gathers = [slot for slot in self.slots if slot[2]["value"] in gathered]
        """Slots of gathered inputs: they take the name of a tensor in the weight store, given as keyword `store`."""
        self.slots = [slot for slot in self.slots if slot[2]["value"] not in gathered]
        self.outputs: list[Mapping[str, Any] | None] = [
            None if name is None else values[name] for name in operator["outputs"]
        ]
        self.partial = False
        """Whether `call` takes None for an output that is not used."""
        self.functional = False
        """Whether `call` has PyTorch make new tensors and copies them."""
        self.call = self._resolve(kernels, copied=bool(operator.get("copied")))

    def __repr__(self) -> str:
        return f"CompiledOperator({self.name}, {len(self.slots)} tensors)"

    def run(self, tensors: Mapping[str, Any], outputs: Sequence[Tensor | None], store: Any = None) -> None:
        """Run on `tensors`, whole storages by value name, and `outputs` by position, None where unused.

        With a `store`, the entry of a gathered input is its name in the store; without, the tensor itself.
        """
        for container, key, operand in self.slots:
            base = tensors[operand["value"]]
            container[key] = base.as_strided(
                operand["size"], operand["stride"], base.storage_offset() + operand.get("offset", 0)
            )
        for container, key, operand in self.gathers:
            container[key] = tensors[operand["value"]]
        if self.gathers and store is not None:
            self.kwargs["store"] = store
        self.call(list(outputs))
        self.kwargs.pop("store", None)
        for container, key, _ in (*self.slots, *self.gathers):
            container[key] = None  # hold nothing between calls

    def _place(self, argument: Any, container: Any, key: Any) -> None:
        if isinstance(argument, dict) and "operand" in argument:
            container[key] = None
            self.slots.append((container, key, argument["operand"]))
        elif isinstance(argument, dict):
            container[key] = _constant(argument)
        elif isinstance(argument, list):
            container[key] = items = list(argument)
            for index, item in enumerate(argument):
                self._place(item, items, index)
        else:
            container[key] = argument

    def _resolve(self, kernels: Kernels, *, copied: bool) -> Callable[[Outputs], None]:
        args, kwargs = self.args, self.kwargs
        if self.name in kernels.fused:
            fused = kernels.fused[self.name]
            return lambda outputs: fused(*args, out=outputs, **kwargs)
        if self.name in kernels.direct and not copied:
            direct = kernels.direct[self.name]
            self.partial = True
            return lambda outputs: direct(*args, out=outputs, **kwargs)
        namespace, operator, overload = self.name.split(".")
        qualified, overload = f"{namespace}::{operator}", "" if overload == "default" else overload
        if qualified in COPIES:

            def call_copy(outputs: Outputs) -> None:
                outputs[0].copy_(args[0])  # type: ignore[union-attr]

            return call_copy
        out = None if copied or None in self.outputs else _out_variant(qualified, overload, kernels.dispatch_key)
        if out is not None:
            native, names = out
            if len(names) == 1:
                name = names[0]

                def call_single(outputs: Outputs) -> None:
                    kwargs[name] = outputs[0]
                    native(*args, **kwargs)

                return call_single

            def call_several(outputs: Outputs) -> None:
                kwargs.update(zip(names, outputs))
                native(*args, **kwargs)

            return call_several
        functional = _native(qualified, overload)
        self.partial = self.functional = True

        def call_and_copy(outputs: Outputs) -> None:
            results = functional(*args, **kwargs)
            for output, result in zip(outputs, (results,) if isinstance(results, Tensor) else results):
                if output is not None:
                    output.copy_(result)

        return call_and_copy


def compile_operator(
    operator: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]], kernels: Kernels
) -> CompiledOperator:
    """Compile an operator (`tightfit.profiles.schema.Operator` as a dict); `values` are those of its program, by name.

    Raises ValueError if the installed PyTorch does not have the operator.
    """
    return CompiledOperator(operator, values, kernels)


def _native(qualified: str, overload: str) -> Callable[..., Any]:
    overloads = torch._C._get_operation_overload(qualified, overload)
    if overloads is None:
        raise ValueError(
            f"this torch has no operator {qualified}.{overload or 'default'}; profile the model again with torch"
            f" {torch.__version__}"
        )
    return overloads[0]


def _out_variant(qualified: str, overload: str, dispatch_key: str) -> tuple[Callable[..., Any], tuple[str, ...]] | None:
    """The out variant with the same arguments and a kernel of the device's own, and the names of its out arguments.

    None if there is none.
    """
    schemas = torch._C._jit_get_schemas_for_operator(qualified)
    functional = next((s for s in schemas if s.overload_name == overload), None)
    if functional is None:
        raise ValueError(
            f"this torch has no operator {qualified}.{overload or 'default'}; profile the model again with torch"
            f" {torch.__version__}"
        )
    arguments = [(a.name, str(a.type)) for a in functional.arguments]
    for schema in schemas:
        results = [a.name for a in schema.arguments if a.is_out]
        inputs = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
        qualified_name = f"{qualified}.{schema.overload_name}"
        if (
            len(results) == len(functional.returns)
            and inputs == arguments
            and torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, dispatch_key)
        ):
            return _native(qualified, schema.overload_name), tuple(results)
    return None


def _constant(argument: Mapping[str, Any]) -> Any:
    """The Python object of an argument such as ``{"dtype": "float32"}``. Raises ValueError for an unknown kind."""
    ((kind, value),) = argument.items()
    if kind == "float":
        return float(value)
    if kind == "device":
        return torch.device(value)
    if kind in ("dtype", "memory_format", "layout"):
        return getattr(torch, value)
    raise ValueError(
        f"unknown argument {dict(argument)} in a program; the plan was written by another version, plan again"
    )
