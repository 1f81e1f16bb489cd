"""A module's own gradients in a trace: custom `torch.autograd.Function`s run as they are, hooks are refused.

torch.export looks through a Function: it records the operators of its forward, of which autograd would later take the
derivative, and not its backward. Here each use of one is recorded as an operator of its own, which `restore` turns into a
call of the Function itself, so that the joint trace of forward and backward goes through its own backward.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import FunctionCtx, _SingleLevelFunction
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from tightfit.profiles.tracing.own_code import line_of_function
from tightfit.runtime.common.errors import InputError

_NAMESPACE = "tightfit_functions"
_library = torch.library.Library(_NAMESPACE, "DEF")
_numbers = itertools.count()
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class _Tensor:
    """Stands for a tensor among arguments and results."""


class _Use:
    """A Function with all its arguments but the tensors, as an operator for torch.export and as a call of the Function."""

    def __init__(self, function: type[torch.autograd.Function], arguments: list[Any], form: pytree.TreeSpec) -> None:
        self.function, self.arguments, self.form = function, arguments, form
        self.results: list[Any] = []
        """what the Function returned last, flat, `_Tensor` in the place of tensors"""
        self.results_form = form
        name = f"function{next(_numbers)}"

        def call(tensors: Sequence[Tensor]) -> list[Tensor]:
            return self._run(tensors)

        call.__name__ = name
        self.call = call
        _library.define(f"{name}(Tensor[] tensors) -> Tensor[]")
        # Of an operator for torch no result may be an input, or a view of one.
        torch.library.register_fake(
            f"{_NAMESPACE}::{name}", lambda tensors: [torch.empty_like(made) for made in call(tensors)], lib=_library
        )
        self.operator = getattr(getattr(torch.ops, _NAMESPACE), name).default

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        leaves = [next(given) if argument is _Tensor else argument for argument in self.arguments]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        made, self.results_form = pytree.tree_flatten(_apply(self.function, *args, **kwargs))
        self.results = [_Tensor if isinstance(one, Tensor) else one for one in made]
        return [one for one in made if isinstance(one, Tensor)]

    def shaped(self, tensors: Sequence[Tensor]) -> Any:
        """Tensors in the form in which the Function returned its own."""
        made = iter(tensors)
        leaves = [next(made) if one is _Tensor else one for one in self.results]
        return pytree.tree_unflatten(leaves, self.results_form)

    def is_of(self, function: type[torch.autograd.Function], arguments: list[Any], form: pytree.TreeSpec) -> bool:
        return (
            function is self.function
            and form == self.form
            and len(arguments) == len(self.arguments)
            and all(map(_same, arguments, self.arguments))
        )


class CustomFunctions:
    """`recorded()` while torch.export traces, then `restore(graph)`."""

    def __init__(self) -> None:
        self.uses: list[_Use] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Raises InputError for a Function that changes its input."""
        inside = False

        def apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if function is CheckpointFunction:  # what is kept and what is computed again the plan decides
                return args[0](*args[2:])
            # PyTorch's own have the derivative of their forward.
            if inside or function.__module__.partition(".")[0] == "torch":
                return _apply(function, *args, **kwargs)
            leaves, form = pytree.tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            arguments = [_Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            use = next((own for own in self.uses if own.is_of(function, arguments, form)), None)
            if use is None:
                use = _Use(function, arguments, form)
                self.uses.append(use)
            inside = True
            try:
                return use.shaped(use.operator(tensors))
            finally:
                inside = False

        def mark_dirty(context: Any, *tensors: Tensor) -> None:
            name = type(context).__name__.removesuffix("Backward")
            raise InputError(
                f"the autograd Function {name} changes its input in place (mark_dirty); let it return a new tensor"
            )

        # All uses come here, those too of somebody who took `apply` off the class before.
        with (
            mock.patch.object(_SingleLevelFunction, "apply", classmethod(apply), create=True),
            mock.patch.object(FunctionCtx, "mark_dirty", mark_dirty),
        ):
            yield

    def restore(self, graph: fx.Graph) -> None:
        """Every recorded operator of the graph becomes a call of its Function."""
        for use in self.uses:
            for node in graph.find_nodes(op="call_function", target=use.operator):
                node.target = use.call


def _apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    """What `function.apply` comes to."""
    return super(_SingleLevelFunction, function).apply(*args, **kwargs)  # type: ignore[misc]


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


class Detaching(TorchFunctionMode):
    """Detaches what is made under `torch.no_grad()`: in what torch.export makes of it, gradients would flow through."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            return made
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}

        def detached(tensor: Tensor) -> Tensor:
            # What works in place returns what it was given.
            return tensor if id(tensor) in given else tensor.detach()

        return pytree.tree_map_only(Tensor, detached, made)


def refuse_hooks(module: nn.Module) -> None:
    """Raises InputError for a hook on the gradient of a parameter or on the backward of a module: no trace runs it."""
    for name, parameter in module.named_parameters():
        for kind, hooks in (
            ("register_hook", parameter._backward_hooks),
            ("register_post_accumulate_grad_hook", getattr(parameter, "_post_accumulate_grad_hooks", None)),
        ):
            for hook in (hooks or {}).values():
                raise _hook_error(f"parameter {name}", kind, hook)
    for name, part in module.named_modules():
        where = f"module {name or type(module).__name__}"
        for hook in part._backward_hooks.values():
            raise _hook_error(where, "register_full_backward_hook", hook)
        for hook in part._backward_pre_hooks.values():
            raise _hook_error(where, "register_full_backward_pre_hook", hook)
    every = nn.modules.module
    for hook in (*every._global_backward_hooks.values(), *every._global_backward_pre_hooks.values()):
        raise _hook_error("every module", "register_module_full_backward_hook", hook)


@contextlib.contextmanager
def hooks_refused() -> Iterator[None]:
    """Inside, whoever registers a hook on a tensor's gradient meets an InputError."""

    def refusing(kind: str) -> Callable[..., None]:
        def register(tensor: Tensor, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            caller = sys._getframe(1)
            place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            raise _hook_error(f"at {place} a tensor of shape {list(tensor.shape)}", kind, hook)

        return register

    kinds = ("register_hook", "register_post_accumulate_grad_hook")
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(Tensor, kind, refusing(kind)))
        yield


def _hook_error(where: str, kind: str, hook: Callable[..., Any]) -> InputError:
    return InputError(
        f"{where} has a hook on its gradient ({kind} of {line_of_function(hook)}), which a traced step would leave out; remove it,"
        " or do the same in the backward of a torch.autograd.Function, which is run as it is"
    )
