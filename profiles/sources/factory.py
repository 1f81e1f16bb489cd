"""Opens models given as `package.module:factory`: any nn.Module, with its initial parameters and buffers."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from tightfit.profiles.tracing.eager_steps import STEPS
from tightfit.profiles.tracing.loss_function import adopted_loss, with_loss
from tightfit.profiles.tracing.own_code import own_traceback
from tightfit.profiles.weights.source import Source, SourceTensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import VERSION, Entry
from tightfit.runtime.engine.weights.store import RAW

KINDS = {dtype: name for name, dtype in RAW.items()}
INPUTS = "inputs"
"""Key in a model's `config`: how many tensors of a batch are the module's inputs, where the others are a loss_fn's
targets.
"""


def factory_source(source: str, *, seed: int = 0) -> Source:
    """A source for the module that a factory makes; it is called with torch's generator seeded with `seed`.

    The factory returns (module, sample batch) or (module, sample batch, loss_fn). Floating-point parameters and buffers
    are stored in float32, other buffers unchanged. Raises InputError as `build_module` does.
    """
    module, _, inputs = build_module(source, seed)
    state_tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    entries, digest = {}, hashlib.sha256(json.dumps([VERSION, "module", source]).encode())
    for name, tensor in state_tensors.items():
        kind = "float32" if tensor.is_floating_point() else KINDS.get(tensor.dtype)
        if tensor.is_complex():
            raise InputError(
                f"{source}: {name!r} has type {tensor.dtype}, and optimizers here update real numbers; hold it as real"
                " and imaginary part, two parameters or buffers, and compute with torch.complex(self.real, self.imag)"
            )
        if kind is None:
            raise InputError(
                f"{source}: {name!r} has type {tensor.dtype}; parameters must be floating, buffers {', '.join(RAW)}"
            )
        entries[name] = Entry(name=name, shape=tuple(tensor.shape), format=kind)
        contents = _stored(tensor)
        digest.update(f"{name} {kind} {list(tensor.shape)}".encode())
        if contents.numel():
            digest.update(contents.view(-1).view(torch.uint8).numpy().data)

    names = {id(tensor): name for name, tensor in state_tensors.items()}
    state = module.state_dict(keep_vars=True)
    if unsaved := [key for key, value in state.items() if id(value) not in names]:
        raise InputError(
            f"{source}: the module's state_dict holds {', '.join(unsaved)}, no parameter or buffer (of get_extra_state,"
            " for example), and a trained model is saved without such things; keep them in buffers, or leave them out"
        )
    keys = {key: names[id(tensor)] for key, tensor in state.items()}

    def tensors() -> Iterable[SourceTensor]:
        for name, entry in entries.items():
            matrix = _stored(state_tensors[name]).view(entry.rows, entry.columns)
            yield SourceTensor(entry=entry, rows=lambda start, stop, matrix=matrix: matrix[start:stop])  # type: ignore[misc]

    return Source(
        name=source.replace(":", "."),
        kind="module",
        path=source,
        config={"factory": source, "state_dict": keys} | ({} if inputs is None else {INPUTS: inputs}),
        fingerprint=digest.hexdigest(),
        has_weights=True,
        entries=entries,
        tensors=tensors,
        note="parameters kept as float32",
    )


def build_module(source: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...], int | None]:
    """(module, sample batch, inputs) of a factory, as `build_with_batches` makes them."""
    module, batches, inputs = build_with_batches(source, seed)
    return module, batches[0], inputs


def build_with_batches(source: str, seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, ...]], int | None]:
    """(module, batches, inputs) of a factory, in float32, with the same initial parameters for the same seed.

    The first of the batches is the sample; there are more, at most `STEPS`, where the factory gives an iterator of
    batches or a DataLoader in its place. The module returns the loss of a batch's tensors, one after the other. Where
    the factory gives a loss_fn, the first `inputs` of them are the module's own and the others the loss_fn's targets;
    otherwise `inputs` is None.

    Raises InputError if the factory cannot be imported, fails, or returns something else.
    """
    factory = load_factory(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            returned, others = _first_batch(factory())
        except Exception as error:
            raise InputError(
                f"{source} raised {type(error).__name__}: {error}; correct the factory\n{own_traceback(error)}"
            ) from error
    if not (
        isinstance(returned, tuple)
        and len(returned) in (2, 3)
        and isinstance(returned[0], nn.Module)
        and isinstance(returned[1], tuple | list)
    ):
        description = type(returned).__name__
        if isinstance(returned, tuple):
            description = f"({', '.join(type(item).__name__ for item in returned)})"
        raise InputError(
            f"{source}: returned {description}; a factory returns (nn.Module, tuple of sample batch tensors), or these"
            " and a loss_fn"
        )
    module, batch, *loss_fn = returned
    module = _uncompiled(module)
    inputs: int | None = None
    if loss_fn:
        batch, inputs = flat_batch(batch, f"{source}: the sample batch")
        others = [flat_batch(further, f"{source}: a further batch")[0] for further in others]
    others = [further for further in others if all(isinstance(tensor, Tensor) for tensor in further)]
    for index, tensor in enumerate(batch):
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"{source}: item {index} of the sample batch is of type {type(tensor).__name__}; a batch is a tuple of"
                " tensors"
            )
    _check_types(module, source)
    if not any(True for _ in module.parameters()):
        raise InputError(f"{source}: the module has no parameters; there is nothing to train")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError(f"{source}: no parameter of the module requires a gradient; there is nothing to train")
    try:
        with_loss(module, loss_fn[0] if loss_fn else None, inputs)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    module.float()
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()  # the layout in which it is stored
    # Copies, since torch.export does not take views of one tensor, such as those of `x, y = pair`.
    batch_name = f"{source}: the sample batch"
    batches = [tuple(tensor.clone() for tensor in as_trained(tensors, batch_name)) for tensors in (batch, *others)]
    layouts = [[(tensor.shape, tensor.dtype) for tensor in tensors] for tensors in batches]
    return module, [tensors for tensors, layout in zip(batches, layouts, strict=True) if layout == layouts[0]], inputs


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module with every part that torch.compile made in place of the part that it was made of."""
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    while isinstance(module, compiled):
        module = module._orig_mod
    for part in module.modules():
        part._compiled_call_impl = None
        for name, child in part.named_children():
            if isinstance(child, compiled):
                part._modules[name] = _uncompiled(child)
    return module


def _first_batch(returned: Any) -> tuple[Any, list[Any]]:
    """(what a factory returns with one sample batch, further batches), where it gives an iterable of batches."""
    if not isinstance(returned, tuple) or len(returned) < 2 or isinstance(returned[1], tuple | list | Tensor):
        return returned, []
    batches = list(itertools.islice(returned[1], STEPS)) if isinstance(returned[1], Iterable) else []
    if not batches or not isinstance(batches[0], tuple | list):
        return returned, []
    return (returned[0], batches[0], *returned[2:]), batches[1:]


def _check_types(module: nn.Module, source: str) -> None:
    """Raise InputError for parameters and buffers without a shape, and for float64 ones, which float32 would round."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if lazy_names := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise InputError(
            f"{source}: {', '.join(lazy_names)} have no shape before the module has seen a batch (LazyLinear and the"
            " like); call it in the factory once, on the sample batch"
        )
    if float64_names := [name for name, tensor in tensors if tensor.dtype is torch.float64]:
        raise InputError(
            f"{source}: {', '.join(float64_names)} are float64, and a step computes in float32; where that will do,"
            " return module.float()"
        )


def flat_batch(batch: Sequence[Any], name: str) -> tuple[list[Any], int]:
    """(the tensors of a batch (inputs, targets), how many of them are inputs), where a module has a loss_fn.

    Either part is a tensor or a tuple of tensors. Raises InputError, which calls the batch `name`, for another number
    of parts.
    """
    if len(batch) != 2:
        raise InputError(
            f"{name} has {len(batch)} item{'s' * (len(batch) != 1)}; where there is a loss_fn it has two, inputs and"
            " targets: tensors or tuples of tensors, such as ((a, b), labels) for a module of two inputs"
        )
    inputs, targets = ([part] if isinstance(part, Tensor) else list(part) for part in batch)
    return [*inputs, *targets], len(inputs)


def narrowed(
    module: nn.Module, batch: Sequence[Tensor], inputs: int | None, dtype: torch.dtype
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What `build_module` makes, with parameters and inputs in `dtype`, as after `module.to(dtype)`.

    Norms with running statistics stay in float32, since statistics in bfloat16 would stand still, and so do the buffers
    and targets of a loss_fn.
    """
    module.to(dtype)
    norms = [kept for kept in module.modules() if isinstance(kept, _NormBase)]
    for kept in (*norms, *adopted_loss(module)):
        kept.float()
    count = len(batch) if inputs is None else inputs
    tensors = (t.to(dtype) if t.is_floating_point() and index < count else t for index, t in enumerate(batch))
    return module, tuple(tensors)


def as_trained(batch: Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
    """A batch's tensors as a run reads them: contiguous, floating-point ones in float32.

    Raises InputError, which calls the batch `name`, for float64 tensors, which float32 would round.
    """
    if float64_items := [str(index) for index, tensor in enumerate(batch) if tensor.dtype is torch.float64]:
        raise InputError(
            f"{name}: item {', '.join(float64_items)} is float64, and a step computes in float32; where that will do,"
            " give tensor.float()"
        )
    return tuple((tensor.float() if tensor.is_floating_point() else tensor).contiguous() for tensor in batch)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def load_factory(source: str) -> Callable[..., Any]:
    """Import ``package.module:factory``. Raises InputError, naming what is missing and where it was looked for.

    Appends the working folder to `sys.path` and leaves it there, since a module may import its neighbours when it is
    called too. It comes last, so that no file in it shadows an installed package or one of tightfit's.
    """
    module_name, _, attribute = source.partition(":")
    folder = _working_folder(source)
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # the module may have been written a moment ago
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{source}: {_not_found(error, module_name, folder)}") from error
    except Exception as error:
        raise InputError(f"{source}: importing {module_name!r} raised {type(error).__name__}: {error}") from error
    factory: Callable[..., Any] | None = getattr(module, attribute, None)
    if factory is None or not callable(factory):
        raise InputError(
            f"{source}: module {module_name!r} has no function {attribute!r}; the module is {_place(module)}"
        )
    return factory


def _working_folder(source: str) -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError as error:
        raise InputError(
            f"{source}: the working folder, in which a module is looked for, was removed; enter another"
        ) from error


def _not_found(error: ModuleNotFoundError, module_name: str, folder: str) -> str:
    """Advice for a module that was not found while importing `module_name`."""
    missing = error.name or ""
    if not f"{module_name}.".startswith(f"{missing}."):
        return f"importing {module_name!r} needs {missing!r}, which is not installed and not in {folder}; install it"
    package = sys.modules.get(missing.rpartition(".")[0])
    if package is not None and not Path(_place(package)).is_relative_to(folder):
        return (
            f"{error} in the package at {_place(package)}, which comes before the working folder {folder}; rename yours"
        )
    return f"{error}; it is not installed and not in the working folder {folder}; run from the folder that holds it"


def _place(module: ModuleType) -> str:
    """The file of a module, or the folder of a package that has none."""
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "Python's own")
