"""Trains a module for a few steps as PyTorch does, and refuses one that a traced step cannot follow: whose results depend on
more than its parameters, its running statistics, the batch and PyTorch's generator, or whose forward changes a parameter.
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

from tightfit.profiles.tracing.loss_function import called
from tightfit.profiles.tracing.own_code import own_traceback
from tightfit.profiles.tracing.own_dropout import dropout_off
from tightfit.profiles.tracing.own_state import (
    advance_counters,
    changed_attributes,
    draws_watched,
    refuse_draws,
    state_copy,
)
from tightfit.runtime.common.errors import InputError

Batch = tuple[Tensor, ...]
STEPS = 3
APART = 1e-6
"""Largest difference, relative to the size of a result, between two calls of a module in PyTorch that ought to be equal: some of its
kernels sum in an order that changes."""
NOISE = 1e-6
"""Part of a difference that is ignored, relative to the norm of all gradients (all statistics) together: one that should be zero is of
this size if it comes from sums that cancel."""
UNSTEADY = 10.0
"""A difference of up to this many times what rounding moves a result by is accepted."""
PERTURBED = 0.1
"""Largest change of a floating-point value of a batch, relative to it."""
MOST_UNSTEADY = 1e-3
"""Largest difference that is accepted so between two calls that ought to be equal: what is drawn anew moves results further."""
COUNTED_ON = (1_000, 100_000)
"""How many times as far a module's counters are set as they came in the steps that it took, to see whether results depend on them."""


@dataclass(frozen=True, kw_only=True)
class EagerResult:
    """What a step of a module gives."""

    loss: float
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """by name of the parameter"""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """the buffers that the forward changed, as it left them"""
    twice: tuple[str, ...] = ()
    """of these, the ones that the backward changed again, as `torch.utils.checkpoint` does"""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and all(bool(made.isfinite().all()) for made in self.gradients.values())


Taken = Callable[[int, Batch, Mapping[str, Tensor], EagerResult], None]
"""takes a step's number from 0, its batch, the parameters and buffers before it, and what it gave"""


class StepError(InputError):
    """The user's module failed in a step, with the traceback `trace`."""

    def __init__(self, module: nn.Module, trace: str) -> None:
        super().__init__(f"{type(module).__name__} fails on the sample batch; correct its {called(module)}\n{trace}")
        self.trace = trace


def eager_step(
    module: nn.Module,
    batch: Iterable[Tensor],
    *,
    seed: int = 0,
    gradients: bool = True,
    given: Mapping[str, Tensor] | None = None,
) -> EagerResult:
    """One step of the module in PyTorch, without an update and without dropout, with torch's generator seeded with `seed`.

    `given` are its parameters and buffers before the step (default: copies of them are made). Without `gradients` the forward alone
    is run. Raises StepError, with the user's own traceback, if the module fails, and InputError if it changes a parameter or draws
    random numbers that are not PyTorch's.
    """
    given = held(module) if given is None else given
    module.zero_grad(set_to_none=True)
    changed: dict[str, Tensor] = {}
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.set_grad_enabled(gradients),
            dropout_off(),
            draws_watched() as drawn,
        ):
            warnings.simplefilter("ignore")  # warnings of the user's own code are shown when they train
            torch.manual_seed(seed)
            results = pytree.tree_leaves(module(*(tensor.clone() for tensor in batch)))
            loss = next(result for result in results if isinstance(result, Tensor))
            changed = {name: now.clone() for name, now in module.named_buffers() if not _equal(now, given.get(name))}
            if gradients:
                loss.backward()
    except Exception as error:
        raise StepError(module, own_traceback(error)) from error
    refuse_draws(module, drawn)
    refuse_changed(module, [name for name, now in module.named_parameters() if not _equal(now, given.get(name))])
    made = {name: p.grad.to_dense() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    buffers = dict(module.named_buffers())
    return EagerResult(
        loss=float(loss.detach().double().sum()),
        gradients=made,
        statistics=changed,
        twice=tuple(name for name, value in changed.items() if not _equal(value, buffers[name])),
    )


def refuse_changed(module: nn.Module, names: Sequence[str], where: str = "") -> None:
    """Raise InputError if there are `names` of parameters that the module's forward changes."""
    if not names:
        return
    parameter = dict(module.named_parameters(remove_duplicate=False))[names[0]]
    advice = (
        "Compute with a changed value in its place (self.weight.clamp(-1, 1) where the weight is used, or torch.nn.utils.parametrize)"
        if parameter.requires_grad
        else "Parameters that follow others, such as the teacher of BYOL or a moving average, cannot be kept here; train it with PyTorch"
    )
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise InputError(
        f"{type(module).__name__} changes the parameter {names[0]}{more} in its forward{where}, which a traced step leaves out: there,"
        f" only the optimizer changes parameters. {advice}"
    )


def held(module: nn.Module) -> dict[str, Tensor]:
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

    They are taken by a copy, which shares parameters and buffers with `module`; these have their values again afterwards. Each step is
    taken by a copy without a history, too: where the two differ, the module is refused. Without `gradients` a step is a forward on the
    sample.
    """

    def __init__(
        self, name: str, module: nn.Module, sample: Batch, others: Sequence[Batch] = (), *, gradients: bool = True
    ) -> None:
        self.name, self.module, self.sample, self.others, self.gradients = name, module, sample, others, gradients
        self.batches = ""
        """on what the steps were taken, in words"""
        self.copied = True
        """whether the module can be copied; if not, it takes the steps itself, and none is taken without a history"""

    def take(self, taken: Taken = lambda *_: None) -> int:
        """Take the steps, calling `taken` after each; again from the first if the module does not take batches that are unlike the
        sample. Returns how many were taken: fewer than `STEPS` if one has results that are no numbers.

        Raises InputError if the module fails, or cannot be followed by a traced step.
        """
        given = [self.sample, *self.others]
        kinds = [("the sample batch", [self.sample] * STEPS)]
        if self.gradients:
            drawn = [_other(self.sample, number, values=True) for number in range(len(given), STEPS)]
            rows = [_other(self.sample, number, values=False) for number in range(STEPS)]
            kinds = [("different batches", [*given, *drawn]), ("the sample's rows in other orders", rows), *kinds]
        start, count = held(self.module), 0
        for self.batches, batches in kinds:
            try:
                count = self._take(batches, taken, strict=self.batches == kinds[-1][0])
            finally:
                load(self.module, start)
            if count == len(batches):
                break
        return count

    def _take(self, batches: Sequence[Batch], taken: Taken, *, strict: bool) -> int:
        pristine = state_copy(self.module)
        self.copied = pristine is not None
        module = self.module if pristine is None else _copied(pristine)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained) if trained else None
        for number, batch in enumerate(batches):
            given = held(module)
            try:
                fresh = None if pristine is None else self._step(_copied(pristine), batch, number, given)
                load(module, given)
                own = self._step(module, batch, number, given)
            except StepError as error:
                if not number:
                    raise
                if strict:
                    raise InputError(
                        f"{self.name}: {called(module)} fails in step {number + 1}, on the batch that it took in step 1; see what it"
                        f" keeps from one step to the next\n{error.trace}"
                    ) from error
                return number
            if not own.finite:
                if not number:
                    taken(number, batch, given, own)
                return max(1, number)
            if pristine is not None and fresh is not None:
                last = number == len(batches) - 1
                self._refuse_history(number, batch, given, pristine, module, (own, fresh), last=last)
            taken(number, batch, given, own)
            if optimizer is not None:
                for name, parameter in module.named_parameters():
                    parameter.grad = own.gradients.get(name)
                optimizer.step()
                optimizer.zero_grad()
        return len(batches)

    def _step(self, module: nn.Module, batch: Batch, number: int, given: Mapping[str, Tensor]) -> EagerResult:
        return eager_step(module, batch, seed=number, gradients=self.gradients, given=given)

    def _refuse_history(
        self,
        number: int,
        batch: Batch,
        given: Mapping[str, Tensor],
        pristine: nn.Module,
        module: nn.Module,
        steps: tuple[EagerResult, EagerResult],
        *,
        last: bool,
    ) -> None:
        """Raise InputError if the first of `steps`, taken by `module`, differs from the second, the same step of a copy that has taken
        none before, or if, after the last, a step does that has counters as after many more.
        """
        own, fresh = steps
        left = {name: buffer.clone() for name, buffer in module.named_buffers()}
        load(module, given)
        differing = self._difference(own, fresh, pristine, batch, number)
        for times in COUNTED_ON if last else ():
            counted = state_copy(module)
            if differing is None and counted is not None and advance_counters(pristine, counted, times):
                with contextlib.suppress(StepError):
                    aged = self._step(counted, batch, number, given)
                    differing = self._difference(aged, fresh, pristine, batch, number)
                    differing = differing and f"{differing}, with its counters as after {times} times as many steps"
                load(module, given)
        load(module, left)
        if differing is None:
            return
        names = changed_attributes(pristine, module)
        if names:
            kept = ", ".join(names[:5])
            raise InputError(
                f"{self.name}: what a step computes depends on the steps before it (its forward changes {kept}), of which a traced step knows nothing: in step"
                f" {number + 1}, beside a copy that took none of them, {differing}. Hand what changes from step to step (a factor, the"
                " number of the step) over as a tensor of the batch, and begin every step without what the one before left"
            )
        raise InputError(
            f"{self.name}: the same step gives other results when it is taken again: in step {number + 1} {differing}. Its forward"
            " reads something that changes and is no attribute of it, such as a global variable, a clock or random numbers that are"
            " not PyTorch's; a traced step would keep what was read when it was traced. Hand it over as a tensor of the batch, or draw"
            " with PyTorch"
        )

    def _difference(
        self, own: EagerResult, fresh: EagerResult, pristine: nn.Module, batch: Batch, number: int
    ) -> str | None:
        """How two steps that ought to be equal differ, in words; None if they do not, or no more than rounding explains."""
        apart = distances(own, fresh)
        if all(far <= APART for far in apart.values()):
            return None
        unsteady = distances(fresh, shaken(pristine, batch, seed=number) or fresh)
        apart = beyond_rounding(apart, unsteady, most=MOST_UNSTEADY)
        return None if all(far <= APART for far in apart.values()) else described(apart, own, fresh)


def _copied(module: nn.Module) -> nn.Module:
    made = state_copy(module)
    assert made is not None  # a copy can be copied
    return made


def distances(own: EagerResult, theirs: EagerResult) -> dict[str, float]:
    """Relative differences of loss ("loss"), gradients (by parameter) and statistics (by buffer) from `theirs`; a missing gradient
    counts as zero.
    """
    apart = {"loss": abs(own.loss - theirs.loss) / max(abs(theirs.loss), NOISE)}
    for ours, due in ((own.gradients, theirs.gradients), (own.statistics, theirs.statistics)):
        sizes = {name: float(made.double().norm()) for name, made in due.items()}
        noise = NOISE * math.hypot(*sizes.values())
        for name in dict.fromkeys((*ours, *due)):
            one, other = (made.get(name, torch.zeros(())).double() for made in (ours, due))
            beyond, size = max(0.0, float((one - other).norm()) - noise), sizes.get(name, 0.0)
            apart[name] = beyond / size if size else (math.inf if beyond else 0.0)
    return apart


def beyond_rounding(
    apart: Mapping[str, float], unsteady: Mapping[str, float], most: float = math.inf
) -> dict[str, float]:
    """The part of distances that rounding does not explain, `most` of it at most, where `unsteady` is how far it has moved results: each
    `UNSTEADY` times as far, and as far as the one moved most, since a value near the bend of a ReLU may be any layer's.
    """
    moved = {name: far for name, far in unsteady.items() if not math.isnan(far)}
    worst = max((far for far in moved.values() if far < math.inf), default=0.0)
    explained = {name: min(max(UNSTEADY * moved.get(name, 0.0), worst), most) for name in apart}
    return {name: 0.0 if explained[name] >= far else far - explained[name] for name, far in apart.items()}


def described(apart: Mapping[str, float], own: EagerResult, theirs: EagerResult) -> str:
    """The largest of `distances` in words."""
    worst = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
    if worst == "loss":
        return f"the loss is {own.loss:g} for {theirs.loss:g}"
    kind = "gradient" if worst in {*own.gradients, *theirs.gradients} else "statistic"
    result = f"the {kind} {'of ' * (kind == 'gradient')}{worst}"
    return (
        f"{result} is not zero"
        if apart[worst] == math.inf
        else f"{result} differs by {apart[worst]:.2g} times its size"
    )


def shaken(module: nn.Module, batch: Batch, *, seed: int = 0) -> EagerResult | None:
    """`eager_step` with every parameter changed in its last bit: how far the results then are from those before is about how
    far rounding has moved these. None if the module cannot be copied.
    """
    try:
        other = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in other.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)
        return eager_step(other, batch, seed=seed)
    except Exception:
        return None


def _other(sample: Batch, number: int, *, values: bool) -> Batch:
    """Batch `number` like the sample, which is number 0: its rows in another order and, with `values`, other values."""
    if not number:
        return sample
    generator = torch.Generator().manual_seed(number)
    rows = next((len(tensor) for tensor in sample if tensor.dim()), 0)
    order = torch.randperm(rows, generator=generator)
    made = [tensor[order] if tensor.dim() and len(tensor) == rows else tensor for tensor in sample]
    return tuple(_redrawn(tensor, generator) if values else tensor for tensor in made)


def _redrawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Other values in the range of the tensor's: integers (in floating point too) are drawn from its own, others change a little."""
    if not tensor.numel() or tensor.is_complex():
        return tensor
    if not tensor.is_floating_point() or torch.equal(tensor, tensor.round()):
        return tensor.reshape(-1)[torch.randint(tensor.numel(), tensor.shape, generator=generator)]
    change = 1 + PERTURBED * (2 * torch.rand(tensor.shape, generator=generator) - 1)
    return (tensor * change).clamp(tensor.min(), tensor.max()).to(tensor.dtype)
