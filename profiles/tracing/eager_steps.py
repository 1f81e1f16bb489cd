"""Trains a module for a few steps as PyTorch does, and refuses one that a traced step cannot follow: whose results
depend on more than its parameters, its running statistics, the batch and PyTorch's generator, or whose forward changes
a parameter.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tightfit.profiles.tracing.loss_function import loss_maker
from tightfit.profiles.tracing.own_code import own_traceback
from tightfit.profiles.tracing.own_draws import draws_watched, refuse_draws
from tightfit.profiles.tracing.own_dropout import dropout_off
from tightfit.profiles.tracing.own_state import Look, State, last_name, shown, state_copy, within
from tightfit.profiles.tracing.unchecked import compile_off
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

Batch = tuple[Tensor, ...]
STEPS = 3
TOLERANCE = 1e-6
"""Largest difference, relative to the size of a result, between two calls of a module in PyTorch that ought to be
equal: some of its kernels sum in an order that changes.
"""
NOISE = 1e-6
"""Part of a difference that is ignored, relative to the norm of all gradients (all statistics) together: one that
should be zero is of this size if it comes from sums that cancel.
"""
UNSTEADY = 10.0
"""A difference of up to this many times what rounding moves a result by is accepted."""
PERTURBED = 0.1
"""Largest change of a floating-point value of a batch, relative to it."""
MOST_UNSTEADY = 1e-3
"""The largest difference between two calls that rounding may explain: random numbers that are drawn anew move results
further.
"""


@dataclass(frozen=True, kw_only=True)
class EagerResult:
    """The results of one step of a module."""

    loss: float
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """by name of the parameter"""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """the buffers that the forward changed, as it left them"""
    twice: tuple[str, ...] = ()
    """of these, the ones that the backward changed again, as `torch.utils.checkpoint` does"""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and all(bool(gradient.isfinite().all()) for gradient in self.gradients.values())


OnStep = Callable[[int, Batch, Mapping[str, Tensor], EagerResult], None]
"""called after a step with its number from 0, its batch, the parameters and buffers before it, and its results"""


class StepError(InputError):
    """The user's module failed in a step, with the traceback `trace`."""

    def __init__(self, module: nn.Module, trace: str) -> None:
        super().__init__(
            f"{type(module).__name__} fails on the sample batch; correct its {loss_maker(module)}\n{trace}"
        )
        self.trace = trace


def eager_step(
    module: nn.Module,
    batch: Iterable[Tensor],
    *,
    seed: int = 0,
    gradients: bool = True,
    dropout: bool = False,
    before: Mapping[str, Tensor] | None = None,
) -> EagerResult:
    """One step of the module in PyTorch, without an update and without `dropout`, with torch's generator seeded with
    `seed`.

    `before` are its parameters and buffers before the step (default: copies of them are made). Without `gradients` the
    forward alone is run. Raises StepError, with the user's own traceback, if the module fails, and InputError if it
    changes a parameter or draws random numbers that are not PyTorch's.
    """
    before = tensor_copies(module) if before is None else before
    module.zero_grad(set_to_none=True)
    changed: dict[str, Tensor] = {}
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.set_grad_enabled(gradients),
            contextlib.nullcontext() if dropout else dropout_off(),
            compile_off(),
            draws_watched() as drawn,
        ):
            warnings.simplefilter("ignore")  # warnings of the user's own code are shown when they train
            torch.manual_seed(seed)
            results = pytree.tree_leaves(module(*(tensor.clone() for tensor in batch)))
            loss = next(result for result in results if isinstance(result, Tensor))
            changed = {name: now.clone() for name, now in module.named_buffers() if not _equal(now, before.get(name))}
            if gradients:
                loss.backward()
    except Exception as error:
        raise StepError(module, own_traceback(error)) from error
    refuse_draws(module, drawn)
    refuse_changed(module, [name for name, now in module.named_parameters() if not _equal(now, before.get(name))])
    parameter_gradients = {name: p.grad.to_dense() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    buffers = dict(module.named_buffers())
    return EagerResult(
        loss=float(loss.detach().double().sum()),
        gradients=parameter_gradients,
        statistics=changed,
        twice=tuple(name for name, value in changed.items() if not _equal(value, buffers[name])),
    )


def refuse_changed(module: nn.Module, names: Sequence[str], where: str = "") -> None:
    """Raise InputError if there are `names` of parameters that the module's forward changes."""
    if not names:
        return
    parameter = dict(module.named_parameters(remove_duplicate=False))[names[0]]
    advice = (
        "Compute with a changed value in its place (self.weight.clamp(-1, 1) where the weight is used, or"
        " torch.nn.utils.parametrize)"
        if parameter.requires_grad
        else (
            "Parameters that follow others, such as the teacher of BYOL or a moving average, cannot be kept here; train"
            " it with PyTorch"
        )
    )
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise InputError(
        f"{type(module).__name__} changes the parameter {names[0]}{more} in its forward{where}, which a traced step"
        f" leaves out: there, only the optimizer changes parameters. {advice}"
    )


def tensor_copies(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the module's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}


def load(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers of these names their values."""
    with torch.no_grad():
        for name, tensor in _tensors(module).items():
            if name in values:
                tensor.data.copy_(values[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _equal(now: Tensor, then: Tensor | None) -> bool:
    return then is not None and (torch.equal(now, then) or torch.equal(now.nan_to_num(), then.nan_to_num()))


class EagerSteps:
    """Steps of a module with updates by AdamW in between, each on another batch.

    They are taken by a copy, which shares parameters and buffers with `module`; these have their values again
    afterwards. Each step is taken by a copy without a history, too: where the two differ, or a step changes anything in
    Python that outlives it, but for what `ignored` names, the module is refused. What the first step alone changes
    passes, if it does not depend on the batch or the parameters. Without `gradients` a step is a forward on the sample.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        sample: Batch,
        others: Sequence[Batch] = (),
        *,
        gradients: bool = True,
        ignored: Sequence[str] = (),
    ) -> None:
        self.name, self.module, self.sample, self.others, self.gradients = name, module, sample, others, gradients
        self.batches = ""
        """on what the steps were taken, in words"""
        self.copied = True
        """whether the module can be copied; if not, it takes the steps itself, and none is taken without a history"""
        self.look = Look(ignored)
        self.filled: list[str] = []
        """what the first step alone changed in Python"""

    def take(self, on_step: OnStep = lambda *_: None) -> int:
        """Take the steps, calling `on_step` after each; again from the first if the module does not take batches that
        are unlike the sample. Returns how many were taken: fewer than `STEPS` if one has results that are no numbers.

        Raises InputError if the module fails, or cannot be followed by a traced step.
        """
        given = [self.sample, *self.others]
        kinds = [("the sample batch", [self.sample] * STEPS)]
        if self.gradients:
            redrawn = [_other(self.sample, number, values=True) for number in range(len(given), STEPS)]
            rows = [_other(self.sample, number, values=False) for number in range(STEPS)]
            kinds = [("different batches", [*given, *redrawn]), ("the sample's rows in other orders", rows), *kinds]
        initial, count = tensor_copies(self.module), 0
        for self.batches, batches in kinds:
            try:
                count = self._take(batches, on_step, strict=self.batches == kinds[-1][0])
            finally:
                load(self.module, initial)
            if count == len(batches):
                break
        return count

    def _take(self, batches: Sequence[Batch], on_step: OnStep, *, strict: bool) -> int:
        pristine = state_copy(self.module)
        self.copied = pristine is not None
        module = self.module if pristine is None else _copied(pristine)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained) if trained else None
        self.filled, filled = [], {}
        for number, batch in enumerate(batches):
            before = tensor_copies(module)
            first = not number
            try:
                fresh, alone = None, {}
                if pristine is not None:
                    fresh_module = _copied(pristine)
                    with self.look.following() if first else contextlib.nullcontext():
                        fresh = self._step(fresh_module, batch, number, before)
                    alone = self.look(fresh_module) if number == 1 else {}
                    load(module, before)
                earlier = self.look(module)
                with self.look.following() if first and pristine is None else contextlib.nullcontext():
                    result = self._step(module, batch, number, before)
            except StepError as error:
                if not number:
                    raise
                if strict:
                    raise InputError(
                        f"{self.name}: {loss_maker(module)} fails in step {number + 1}, on the batch that it took in"
                        f" step 1; see what it keeps from one step to the next\n{error.trace}"
                    ) from error
                return number
            later = self.look(module, code=pristine is not None or not first)
            changed = self.look.changes(earlier, later)
            if first:
                self.filled, filled = changed, later
            else:
                self._refuse_changes(changed, number)
            if number == 1:
                self._refuse_dependent(filled, alone)
            if not result.finite:
                if not number:
                    on_step(number, batch, before, result)
                return max(1, number)
            if fresh is not None and pristine is not None:
                self._refuse_history(number, batch, before, pristine, module, (result, fresh), changed)
            on_step(number, batch, before, result)
            if optimizer is not None:
                for name, parameter in module.named_parameters():
                    parameter.grad = result.gradients.get(name)
                optimizer.step()
                optimizer.zero_grad()
        return len(batches)

    def _step(self, module: nn.Module, batch: Batch, number: int, before: Mapping[str, Tensor]) -> EagerResult:
        return eager_step(module, batch, seed=number, gradients=self.gradients, before=before)

    def _refuse_changes(self, changed: Sequence[str], number: int) -> None:
        """Raise InputError if step `number` has `changed` anything in Python."""
        if changed:
            names = ",".join(dict.fromkeys(map(last_name, changed[:3])))
            raise InputError(
                f"{self.name}: its forward changes {shown(changed)} in step {number + 1}, which outlives the call, and"
                " a traced step leaves that out. Hand what changes from step to step (a factor, the number of the step)"
                " over as a tensor of the batch, and begin every step without what the one before left. What only"
                f" counts, or is kept for a log, is let through by name: {spelled('ignore_state')} {names}"
            )

    def _refuse_dependent(self, filled: State, alone: State) -> None:
        """Raise InputError if what the first step filled is otherwise after a later step that a copy takes `alone`, or
        if there is no copy.
        """
        apart = [path for path in self.filled if any(filled.get(at) != alone.get(at) for at in within(path, filled))]
        if apart:
            raise InputError(
                f"{self.name}: its forward fills {shown(apart)} in the first call, with what depends on the batch or on"
                " the parameters; a traced step would compute it anew in every step. Compute it before, and register it"
                " as a buffer"
            )

    def _refuse_history(
        self,
        number: int,
        batch: Batch,
        before: Mapping[str, Tensor],
        pristine: nn.Module,
        module: nn.Module,
        steps: tuple[EagerResult, EagerResult],
        changed: Sequence[str],
    ) -> None:
        """Raise InputError if the first of `steps`, taken by `module`, differs from the second, the same step of a copy
        that took none before; `changed` is what the step changed in Python.
        """
        after = {name: buffer.clone() for name, buffer in module.named_buffers()}
        load(module, before)
        difference = self._difference(*steps, pristine, batch, number)
        load(module, after)
        if difference is None:
            return
        reason = f"changes {shown(changed)}" if changed else "reads something that changes"
        let_through = f" ({', '.join(self.look.let_through)} was let through)" if self.look.let_through else ""
        raise InputError(
            f"{self.name}: the same step gives other results when it is taken again: in step {number + 1} {difference}."
            f" Its forward {reason}{let_through}, such as an attribute, a global variable, a clock or random numbers"
            " that are not PyTorch's; a traced step would keep what was read when it was traced. Hand it over as a"
            " tensor of the batch, or draw with PyTorch"
        )

    def _difference(
        self, result: EagerResult, fresh: EagerResult, pristine: nn.Module, batch: Batch, number: int
    ) -> str | None:
        """How two steps that ought to be equal differ, in words; None if they do not, or no more than rounding
        explains.
        """
        relative = distances(result, fresh)
        if all(far <= TOLERANCE for far in relative.values()):
            return None
        rounding = distances(fresh, perturbed_step(pristine, batch, seed=number) or fresh)
        relative = beyond_rounding(relative, rounding, most=MOST_UNSTEADY)
        return (
            None if all(far <= TOLERANCE for far in relative.values()) else describe_distances(relative, result, fresh)
        )


def _copied(module: nn.Module) -> nn.Module:
    copied = state_copy(module)
    assert copied is not None  # a copy can be copied
    return copied


def distances(result: EagerResult, reference: EagerResult) -> dict[str, float]:
    """Relative differences of loss ("loss"), gradients (by parameter) and statistics (by buffer) from `reference`; a
    missing gradient counts as zero.
    """
    relative = {"loss": abs(result.loss - reference.loss) / max(abs(reference.loss), NOISE)}
    for values, expected in ((result.gradients, reference.gradients), (result.statistics, reference.statistics)):
        sizes = {name: float(tensors.double().norm()) for name, tensors in expected.items()}
        noise = NOISE * math.hypot(*sizes.values())
        for name in dict.fromkeys((*values, *expected)):
            value, other = (tensors.get(name, torch.zeros(())).double() for tensors in (values, expected))
            excess, size = max(0.0, float((value - other).norm()) - noise), sizes.get(name, 0.0)
            relative[name] = excess / size if size else (math.inf if excess else 0.0)
    return relative


def beyond_rounding(
    relative: Mapping[str, float], rounding: Mapping[str, float], most: float = math.inf
) -> dict[str, float]:
    """The part of `relative` distances that rounding does not explain. `rounding` is how far it moved each result: it
    explains `UNSTEADY` times that, for any result as much as it moved the furthest (a value near the bend of a ReLU may
    be any layer's), but no more than `most`.
    """
    finite = {name: far for name, far in rounding.items() if not math.isnan(far)}
    largest = max((far for far in finite.values() if far < math.inf), default=0.0)
    explained = {name: min(max(UNSTEADY * finite.get(name, 0.0), largest), most) for name in relative}
    return {name: 0.0 if explained[name] >= far else far - explained[name] for name, far in relative.items()}


def describe_distances(relative: Mapping[str, float], result: EagerResult, reference: EagerResult) -> str:
    """The largest of `distances` in words."""
    worst = max(relative, key=lambda name: math.inf if math.isnan(relative[name]) else relative[name])
    if worst == "loss":
        return f"the loss is {result.loss:g} for {reference.loss:g}"
    kind = "gradient" if worst in {*result.gradients, *reference.gradients} else "statistic"
    label = f"the {kind} {'of ' * (kind == 'gradient')}{worst}"
    return (
        f"{label} is not zero"
        if relative[worst] == math.inf
        else f"{label} differs by {relative[worst]:.2g} times its size"
    )


def perturbed_step(module: nn.Module, batch: Batch, *, seed: int = 0) -> EagerResult | None:
    """`eager_step` with every parameter changed in its last bit: how far the results then are from those before is
    about how far rounding has moved these. None if the module cannot be copied.
    """
    try:
        perturbed = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in perturbed.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)
        return eager_step(perturbed, batch, seed=seed)
    except Exception:
        return None


def _other(sample: Batch, number: int, *, values: bool) -> Batch:
    """Batch `number` like the sample, which is number 0: its rows in another order and, with `values`, other values."""
    if not number:
        return sample
    generator = torch.Generator().manual_seed(number)
    rows = next((len(tensor) for tensor in sample if tensor.dim()), 0)
    order = torch.randperm(rows, generator=generator)
    reordered = [tensor[order] if tensor.dim() and len(tensor) == rows else tensor for tensor in sample]
    return tuple(_redrawn(tensor, generator) if values else tensor for tensor in reordered)


def _redrawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Other values in the range of the tensor's: integers (in floating point too) are drawn from its own, others change
    a little.
    """
    if not tensor.numel() or tensor.is_complex():
        return tensor
    if not tensor.is_floating_point() or torch.equal(tensor, tensor.round()):
        return tensor.reshape(-1)[torch.randint(tensor.numel(), tensor.shape, generator=generator)]
    change = 1 + PERTURBED * (2 * torch.rand(tensor.shape, generator=generator) - 1)
    return (tensor * change).clamp(tensor.min(), tensor.max()).to(tensor.dtype)
