"""Makes a module return its loss alone: the loss that stands among other results, or a function that a factory gives
beside the module, `loss_fn(module(*inputs), *targets)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tightfit.runtime.common.errors import InputError

Loss = Callable[..., Any]
LOSS = "loss"
"""the key of the loss in a dict of results, as the models of transformers return it"""


class WithLoss(nn.Module):
    """Base of the classes that `with_loss` makes."""

    _loss_fn: tuple[Loss | None, int | None]
    """(loss_fn, number of tensors of the batch that are the module's inputs); (None, None): the module has its loss
    itself.
    """


def loss_maker(module: nn.Module) -> str:
    """What messages say returns the loss: loss_fn or forward."""
    return "loss_fn" if isinstance(module, WithLoss) and module._loss_fn[0] else "forward"


def adopted_loss(module: nn.Module) -> list[nn.Module]:
    """The loss_fn, where it is a module whose buffers `with_loss` took over."""
    loss_fn = module._loss_fn[0] if isinstance(module, WithLoss) else None
    adopted = isinstance(loss_fn, nn.Module) and any(part._non_persistent_buffers_set for part in loss_fn.modules())
    return [loss_fn] if adopted else []  # type: ignore[list-item]


def with_loss(module: nn.Module, loss_fn: Loss | None, inputs: int | None) -> None:
    """Have `module(*batch)` return `loss_fn(module(*batch[:inputs]), *batch[inputs:])`, or without a `loss_fn` its own
    loss.

    The module stays the same object, of a class derived from its own, so that its parameters and layers keep their
    names and its hooks see its own inputs and output. Buffers of a `loss_fn` that is a module, such as the weights of
    `nn.CrossEntropyLoss(weight=...)`, become buffers of the module that are not in its state_dict.

    Raises InputError if `loss_fn` cannot be called, or has parameters that are not the module's.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(
            f"loss_fn is of type {type(loss_fn).__name__}; give a function or a module such as nn.MSELoss()"
        )
    owner = loss_fn if isinstance(loss_fn, nn.Module) else getattr(loss_fn, "__self__", None)
    if isinstance(owner, nn.Module) and all(part is not owner for part in module.modules()):
        _check_parameters(module, owner)
        if owner is loss_fn:
            loss_fn = _adopted(module, owner)

    def call(self: Any, *batch: Tensor) -> Any:
        loss_fn, inputs = self._loss_fn
        output = super(derived, self).__call__(*batch[:inputs])
        if loss_fn is None:
            return _loss_of(output)
        try:
            return _loss_of(loss_fn(output, *batch[inputs:]))
        except Exception as error:
            error.add_note(
                f"loss_fn was given the module's output, {_described(output)}, and {_described(batch[inputs:])}"
            )
            raise

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own, under a signature that takes a whole batch: torch.export reads it."""
        return super(derived, self).forward(*args, **kwargs)

    methods = {"__call__": call, "forward": forward, "__module__": __name__}
    derived: Any = type(type(module).__name__, (type(module), WithLoss), methods)
    module.__class__ = derived
    # Past nn.Module's own __setattr__, which would make a loss function that is a module a part of it under another
    # name.
    object.__setattr__(module, "_loss_fn", (loss_fn, inputs))


def _loss_of(results: Any) -> Any:
    """The loss in a dict of results; of other results the tensors, without what lies beside them, such as a cache."""
    if isinstance(results, Mapping) and isinstance(results.get(LOSS), Tensor):
        return results[LOSS]
    if isinstance(results, Tensor):
        return results
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def _check_parameters(module: nn.Module, loss_fn: nn.Module) -> None:
    module_parameters = {id(parameter) for parameter in module.parameters()}
    names = [name for name, parameter in loss_fn.named_parameters() if id(parameter) not in module_parameters]
    if names:
        raise InputError(
            f"loss_fn has parameters of its own ({', '.join(names)}), which the module's state_dict has not; make it a"
            " part of the module (self.loss_fn = ...)"
        )


def _adopted(module: nn.Module, loss_fn: nn.Module) -> nn.Module:
    """A copy of `loss_fn`, whose buffers are the module's from now on; `loss_fn` itself where it has none."""
    if not any(True for _ in loss_fn.buffers()):
        return loss_fn
    loss_fn = copy.deepcopy(loss_fn)
    for part in loss_fn.modules():
        part._non_persistent_buffers_set.update(part._buffers)
    name = "loss_fn"
    while hasattr(module, name):
        name += "_"
    module.add_module(name, loss_fn)
    return loss_fn


def _described(values: Any) -> str:
    """Types and shapes of tensors, for an error."""
    leaves = pytree.tree_leaves(values)
    return (
        ", ".join(
            (
                f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
                if isinstance(leaf, Tensor)
                else type(leaf).__name__
            )
            for leaf in leaves
        )
        or "nothing"
    )
