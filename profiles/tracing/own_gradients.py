"""Keeps custom `torch.autograd.Function`s of a module, with their own backwards, in a trace, and refuses gradient
hooks.

torch.export looks inside a Function: it records the operators of its forward, which autograd would later differentiate
instead of calling the Function's backward. Therefore each use of a Function is recorded as an operator of its own,
which `restore` turns back into a call of the Function, so that the joint trace of forward and backward uses its own
backward.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._functorch import eager_transforms
from torch.autograd.function import FunctionCtx, FunctionMeta, _SingleLevelFunction
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from tightfit.profiles.tracing.own_code import is_own_code, line_of_function
from tightfit.runtime.common.errors import InputError

_NAMESPACE = "tightfit_functions"
_library = torch.library.Library(_NAMESPACE, "DEF")
_numbers = itertools.count()
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class _TensorPlaceholder:
    """Placeholder for a tensor among recorded arguments and results."""


class _FunctionUse:
    """A Function with its arguments other than tensors: `operator` is what torch.export records, `call` calls the
    Function.
    """

    def __init__(self, function: type[torch.autograd.Function], arguments: list[Any], form: pytree.TreeSpec) -> None:
        self.function, self.arguments, self.form = function, arguments, form
        self.results: list[Any] = []
        """What the Function last returned, flattened, with `_TensorPlaceholder` in the place of tensors."""
        self.results_form = form
        name = f"function{next(_numbers)}"

        def call(tensors: Sequence[Tensor]) -> list[Tensor]:
            return self._run(tensors)

        call.__name__ = name
        self.call = call
        _library.define(f"{name}(Tensor[] tensors) -> Tensor[]")
        # New tensors, since torch lets no result of an operator be an input or a view of one.
        torch.library.register_fake(
            f"{_NAMESPACE}::{name}", lambda tensors: [torch.empty_like(made) for made in call(tensors)], lib=_library
        )
        self.operator = getattr(getattr(torch.ops, _NAMESPACE), name).default

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        remaining = iter(tensors)
        leaves = [next(remaining) if argument is _TensorPlaceholder else argument for argument in self.arguments]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        results, self.results_form = pytree.tree_flatten(self.function.apply(*args, **kwargs))
        self.results = [_TensorPlaceholder if isinstance(result, Tensor) else result for result in results]
        return [result for result in results if isinstance(result, Tensor)]

    def shaped(self, tensors: Sequence[Tensor]) -> Any:
        """`tensors` put into the structure (tuple, dict, …) that the Function returned."""
        remaining = iter(tensors)
        leaves = [next(remaining) if result is _TensorPlaceholder else result for result in self.results]
        return pytree.tree_unflatten(leaves, self.results_form)

    def is_of(self, function: type[torch.autograd.Function], arguments: list[Any], form: pytree.TreeSpec) -> bool:
        return (
            function is self.function
            and form == self.form
            and len(arguments) == len(self.arguments)
            and all(map(_same, arguments, self.arguments))
        )


class CustomFunctions:
    """Records the uses of custom Functions: call torch.export inside `recorded()`, then `restore(graph)`."""

    def __init__(self) -> None:
        self.uses: list[_FunctionUse] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Within this context each use of a custom Function is traced as one operator.

        Raises InputError for a Function that changes its input in place.
        """
        inside = False
        gradients: bool | None = None
        """whether whoever calls a Function wants gradients, where PyTorch's own `apply` does, which computes without
        them
        """

        def apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if function is CheckpointFunction:  # checkpointing is dropped: the plan decides what is recomputed
                return args[0](*args[2:])
            if inside:
                return function.apply(*args, **kwargs)
            leaves, form = pytree.tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            arguments = [_TensorPlaceholder if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            use = next((known for known in self.uses if known.is_of(function, arguments, form)), None)
            if use is None:
                use = _FunctionUse(function, arguments, form)
                self.uses.append(use)
            wanted = torch.is_grad_enabled() if gradients is None else gradients
            inside = True
            try:
                made = use.operator(tensors)
                return use.shaped(made if wanted else [tensor.detach() for tensor in made])
            finally:
                inside = False

        def mark_dirty(context: Any, *tensors: Tensor) -> None:
            name = type(context).__name__.removesuffix("Backward")
            raise InputError(
                f"the autograd Function {name} changes its input in place (mark_dirty); let it return a new tensor"
            )

        def looked_up(function: type[torch.autograd.Function], name: str) -> Any:
            """What a Function's class has: in the place of `apply` the one above. A reference to `apply` that was taken
            earlier is PyTorch's, which looks up the class of the backward, then, without gradients, `forward` and
            `setup_context`.
            """
            nonlocal gradients
            found = type.__getattribute__(function, name)
            # Functions of PyTorch itself are traced through: their backward is the derivative of their forward.
            torchs = type.__getattribute__(function, "__module__").partition(".")[0] == "torch"
            if inside or (torchs and function is not CheckpointFunction):
                return found
            if name == "apply":
                return functools.partial(apply, function)
            if name == "_backward_cls":
                gradients = torch.is_grad_enabled()
            in_context = type.__getattribute__(function, "setup_context") is _SingleLevelFunction.setup_context
            if name == "setup_context" and not in_context:
                return lambda *_: None
            if name != "forward":
                return found

            @functools.wraps(found)
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal gradients
                try:
                    return apply(function, *args[in_context:], **kwargs)
                finally:
                    gradients = None

            return forward

        with (
            mock.patch.object(FunctionMeta, "__getattribute__", looked_up),
            mock.patch.object(FunctionCtx, "mark_dirty", mark_dirty),
        ):
            yield
        inside = True  # for what a forward has kept of `apply`

    def restore(self, graph: fx.Graph) -> None:
        """Replace every recorded operator in the graph by a call of its Function."""
        for use in self.uses:
            for node in graph.find_nodes(op="call_function", target=use.operator):
                node.target = use.call


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


class DetachWithoutGrad(TorchFunctionMode):
    """Detaches results computed under `torch.no_grad()`, because graphs of torch.export lose it and gradients would
    flow.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # Before it traces, torch.export makes fake tensors of parameters and buffers, and of a view it wants a view.
        if torch.is_grad_enabled() or get_proxy_mode() is None or getattr(function, "namespace", None) == _NAMESPACE:
            return result
        input_ids = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}

        def detached(tensor: Tensor) -> Tensor:
            # An in-place operation returns its input, which is not detached.
            return tensor if id(tensor) in input_ids else tensor.detach()

        return pytree.tree_map_only(Tensor, detached, result)


def refuse_hooks(module: nn.Module) -> None:
    """Raise InputError if a parameter has a gradient hook or a module a backward hook: traces run no hooks."""
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
    global_hooks = nn.modules.module
    for hook in (*global_hooks._global_backward_hooks.values(), *global_hooks._global_backward_pre_hooks.values()):
        raise _hook_error("every module", "register_module_full_backward_hook", hook)


@contextlib.contextmanager
def gradients_refused() -> Iterator[None]:
    """Within this context, registering a hook on a tensor's gradient and computing a gradient raise InputError."""

    def refusing_hook(kind: str) -> Callable[..., None]:
        def register(tensor: Tensor, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            raise _hook_error(f"{_calling()} a tensor of shape {list(tensor.shape)}", kind, hook)

        return register

    def refusing(kind: str) -> Callable[..., None]:
        def compute(*args: Any, **kwargs: Any) -> None:
            raise InputError(
                f"{_calling()} forward computes a gradient ({kind}), which is not supported: a trace of a forward has"
                " operators and no gradients, and those of its results would be gradients of gradients. Write the"
                " gradient out in operators of the forward, or train this module with PyTorch"
            )

        return compute

    with contextlib.ExitStack() as stack:
        for name in ("register_hook", "register_post_accumulate_grad_hook"):
            stack.enter_context(mock.patch.object(Tensor, name, refusing_hook(name)))
        for owner, name, kind in (
            (torch.autograd, "grad", "torch.autograd.grad"),
            (torch.autograd, "backward", "torch.autograd.backward"),
            (Tensor, "backward", "Tensor.backward"),
            (eager_transforms, "_autograd_grad", "torch.func"),
        ):
            stack.enter_context(mock.patch.object(owner, name, refusing(kind)))
        yield


def _calling() -> str:
    """``at file:12`` of the innermost of the user's own frames."""
    frame = sys._getframe(2)
    while frame.f_back is not None and not is_own_code(frame.f_code.co_filename):
        frame = frame.f_back
    return f"at {frame.f_code.co_filename}:{frame.f_lineno}"


def _hook_error(where: str, kind: str, hook: Callable[..., Any]) -> InputError:
    return InputError(
        f"{where} has a hook on its gradient ({kind} of {line_of_function(hook)}), which a traced step would leave out;"
        " remove it, or do the same in the backward of a torch.autograd.Function, which is run as it is"
    )
