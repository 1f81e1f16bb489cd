"""Optimizers that update one trainable at a time, in place: from its gradient (AdamW, Adam, SGD, Lion, Adafactor), also
clipped, or from two losses (MeZO).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

NORM_ELEMENTS = 1 << 13
"""elements of a gradient that are squared at a time"""
LION_ELEMENTS = 1 << 16
"""elements of a trainable that are updated at a time"""
NORM_EPSILON = 1e-6
"""added to the norm by which gradients are scaled down, as in PyTorch"""
FACTORED = "adafactor_v"
"""name of Adafactor's state, which is smaller than a large trainable"""


def state_shape(state: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an optimizer's state `state` of a trainable of shape `shape`: the same, or for Adafactor's one flat
    tensor of a mean for each row and each column of every matrix; of vectors, for each element.
    """
    if state != FACTORED:
        return tuple(shape)
    if len(shape) < 2:
        return (math.prod(shape),)
    return (math.prod(shape[:-2]) * (shape[-2] + shape[-1]),)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The settings that all optimizers share: learning rates by step, and decoupled weight decay."""

    lr: float = 2e-4
    weight_decay: float = 0.0
    schedule: str = "constant"
    """After the warmup: constant, or linear or cosine decay to `min_lr_ratio` of `lr`."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0 to `lr`."""
    total_steps: int = 0
    """Steps of the run, warmup included, over which linear and cosine decay."""
    min_lr_ratio: float = 0.0
    """Share of `lr` at which decay ends."""

    def rate(self, step: int, steps: int = 1) -> float:
        """Learning rate of the update that ends with step `step`, counted from 1, and accumulates `steps` steps.

        Warmup and decay count steps, not updates.
        """
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        after = max(0, step - steps - self.warmup_steps)
        progress = min(1.0, after / max(1, self.total_steps - self.warmup_steps))
        if self.schedule == "constant":
            return self.lr
        remaining = 1.0 - progress if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (remaining * (1.0 - self.min_lr_ratio) + self.min_lr_ratio)


class Arithmetic(Protocol):
    """How an optimizer changes one trainable."""

    def make(
        self, settings: Any, rate: float, number: int, parameter: Tensor, gradient: Tensor, *states: Tensor
    ) -> None:
        """Make update `number` of a parameter, counted from 1, in place. All tensors are float32 and contiguous;
        `gradient` stays as it is, and `states` are the optimizer's own.
        """
        ...


class FusedAdam:
    """PyTorch's fused kernel of Adam or AdamW; the states are the first and second moment."""

    def __init__(self, kernel: str) -> None:
        import torch

        self._kernel = torch._C._get_operation_overload(f"aten::_fused_{kernel}_", "")[0]
        self._step = torch.zeros((), dtype=torch.float32)

    def make(
        self, settings: AdamW, rate: float, number: int, parameter: Tensor, gradient: Tensor, *states: Tensor
    ) -> None:
        first, second = states
        self._step.fill_(number)
        self._kernel(
            [parameter], [gradient], [first], [second], [], [self._step],
            lr=rate, beta1=settings.betas[0], beta2=settings.betas[1], weight_decay=settings.weight_decay,
            eps=settings.eps, amsgrad=False, maximize=False,
        )  # fmt: skip


class FusedSGD:
    """PyTorch's fused kernel of SGD; the state, if there is momentum, is that."""

    def __init__(self) -> None:
        import torch

        self._kernel = torch._C._get_operation_overload("aten::_fused_sgd_", "")[0]

    def make(
        self, settings: SGD, rate: float, number: int, parameter: Tensor, gradient: Tensor, *states: Tensor
    ) -> None:
        self._kernel(
            [parameter], [gradient], list(states), weight_decay=settings.weight_decay,
            momentum=settings.momentum, lr=rate, dampening=0.0, nesterov=False, maximize=False,
            is_first_step=False,
        )  # fmt: skip


class SignSteps:
    """Lion: steps by the sign of momentum and gradient mixed, a piece at a time, for which there is room beside
    them.
    """

    def make(
        self, settings: Lion, rate: float, number: int, parameter: Tensor, gradient: Tensor, *states: Tensor
    ) -> None:
        import torch

        (momentum,), (mix, keep) = states, settings.betas
        pieces = zip(*(tensor.view(-1).split(LION_ELEMENTS) for tensor in (parameter, gradient, momentum)))
        for values, slopes, means in pieces:
            if settings.weight_decay:
                values.mul_(1 - rate * settings.weight_decay)
            values.add_(torch.lerp(slopes, means, mix).sign_(), alpha=-rate)
            means.lerp_(slopes, 1 - keep)


@dataclass(frozen=True, kw_only=True)
class AdamW(Rates):
    """Loshchilov and Hutter 2019, "Decoupled weight decay regularization", with PyTorch's defaults."""

    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def arithmetic(self) -> Arithmetic:
        return FusedAdam(self.name)


@dataclass(frozen=True, kw_only=True)
class Adam(AdamW):
    """Kingma and Ba 2015, with PyTorch's defaults; weight decay is added to the gradient, as by `torch.optim.Adam`."""

    name: str = "adam"


@dataclass(frozen=True, kw_only=True)
class SGD(Rates):
    """Without momentum no state at all; weight decay is added to the gradient, as by `torch.optim.SGD`."""

    name: str = "sgd"
    momentum: float = 0.0

    def arithmetic(self) -> Arithmetic:
        return FusedSGD()


@dataclass(frozen=True, kw_only=True)
class Momentum(SGD):
    name: str = "momentum"
    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Lion(Rates):
    """Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2, with its betas; weight decay is
    decoupled.
    """

    name: str = "lion"
    betas: tuple[float, float] = (0.9, 0.99)

    def arithmetic(self) -> Arithmetic:
        return SignSteps()


@dataclass(frozen=True, kw_only=True)
class Adafactor(Rates):
    """Shazeer and Stern 2018, with the defaults of `torch.optim.Adafactor` but for the learning rate; weight decay is
    decoupled. The rate is relative to the root mean square of the parameter.
    """

    name: str = "adafactor"
    beta2_decay: float = -0.8
    """Exponent of an update's number: the share that it has in the second moment."""
    eps: float = 2.0**-23
    """Its square is the smallest second moment: PyTorch's first `eps`, of float32."""
    eps2: float = 1e-3
    """The smallest root mean square of a parameter: PyTorch's second `eps`."""
    clip_threshold: float = 1.0
    """The largest root mean square of a step before it is scaled by the rate: PyTorch's `d`."""

    def arithmetic(self) -> Arithmetic:
        from tightfit.runtime.engine.kernels.adafactor import AdafactorUpdate

        return AdafactorUpdate()


@dataclass(frozen=True, kw_only=True)
class MeZO(Rates):
    """Malladi et al. 2023, "Fine-tuning language models with just forward passes", with their epsilon."""

    name: str = "mezo"
    epsilon: float = 1e-3


Exact = AdamW | SGD | Lion | Adafactor
"""an optimizer that takes a gradient"""
OPTIMIZERS: dict[str, type[Exact | MeZO]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "momentum": Momentum,
    "lion": Lion,
    "adafactor": Adafactor,
    "mezo": MeZO,
}


def optimizer_of(settings: Mapping[str, Any]) -> Exact | MeZO:
    """The optimizer with the fields `settings`, among which `name` chooses its class."""
    return OPTIMIZERS[settings["name"]](**settings)


class GradientUpdate:
    """An optimizer that takes gradients. `apply` updates one trainable; PyTorch's fused kernels read and write each
    tensor once and need no temporary.

    With `accumulate` above 1 the gradients of that many steps make one update. Each is a mean over the labels of its
    batch; the update uses their mean weighted by those numbers of labels, as for one batch of all the steps' samples.
    """

    def __init__(self, optimizer: Exact, accumulate: int = 1) -> None:
        self.optimizer: Exact = optimizer
        self.accumulate = accumulate
        self.summed = 0.0
        """sum of the weights of the steps whose gradients are accumulated so far"""
        self._weight = 1.0
        self._due = True
        self._arithmetic = optimizer.arithmetic()
        self._rate = 0.0

    def begin(self, step: int, weight: float = 1.0) -> None:
        """Begin step `step`, counted from 1, whose gradients are means over `weight` labels; `apply` then belongs to
        it.
        """
        if step % self.accumulate == 1 % self.accumulate:
            self.summed = 0.0
        self.summed += weight
        self._weight = weight
        self._due = step % self.accumulate == 0
        self._rate = self.optimizer.rate(step, self.accumulate)

    def apply(self, count: int, parameter: Tensor, gradient: Tensor, *states: Tensor) -> None:
        """Apply gradient number `count` of a parameter, counted from 1.

        All tensors are float32 and contiguous; all but `gradient` change in place. `states` are of the shapes that
        `state_shape` says: the optimizer's own and, where several steps make an update, the weighted sum of the
        gradients so far: the parameter changes only in the last of those steps.
        """
        if self.accumulate == 1:
            self.make(count, parameter, gradient, *states)
            return
        *own_states, total = states
        total.add_(gradient, alpha=self._weight)
        if self._due:
            self.make(count // self.accumulate, parameter, total.div_(max(1.0, self.summed)), *own_states)
            total.zero_()

    def make(self, number: int, parameter: Tensor, gradient: Tensor, *states: Tensor) -> None:
        """Make update `number` of a parameter, counted from 1, with the gradient given, at the rate of the step that
        began last, as of `Arithmetic.make`.
        """
        self._arithmetic.make(self.optimizer, self._rate, number, parameter, gradient, *states)


class ClippedUpdate(GradientUpdate):
    """An optimizer with gradients scaled down, all of them together, to a norm of at most `max_norm`, as by
    `torch.nn.utils.clip_grad_norm_`.

    `add` takes the gradient of each trainable in each of the `accumulate` steps of an update; once `norm` is asked for,
    `apply_sum` updates from the sums. A norm below `max_norm` changes no bit.
    """

    def __init__(self, optimizer: Exact, max_norm: float, accumulate: int = 1) -> None:
        import torch

        super().__init__(optimizer, accumulate)
        self.max_norm = max_norm
        self.sums = False
        """whether the sums are of an update that is under way; otherwise the next step begins them anew"""
        self._begins = True
        self._squares: list[float] = []
        self._scale = 1.0
        self._room = torch.empty(NORM_ELEMENTS, dtype=torch.float64)

    def begin(self, step: int, weight: float = 1.0) -> None:
        """As `GradientUpdate.apply`. A gradient that makes an update alone is used as it is."""
        super().begin(step, 1.0 if self.accumulate == 1 else weight)
        self._begins = step % self.accumulate == 1 % self.accumulate
        self._squares.clear()
        self.sums = not self._due

    @property
    def due(self) -> bool:
        """Whether the step that began last is the last of an update."""
        return self._due

    def add(self, gradient: Tensor, total: Tensor) -> None:
        """Add a trainable's gradient to its sum, which the first step of an update begins anew."""
        import torch

        if not self._begins:
            total.add_(gradient, alpha=self._weight)
        elif self._weight == 1.0:
            total.copy_(gradient)
        else:
            torch.mul(gradient, self._weight, out=total)
        if self._due:
            self._squares.append(self._squared(total))

    def norm(self) -> float:
        """The norm of all gradients of an update, their means where several steps make one; call it after the last
        step.

        Squares are added up exactly, so that the result does not depend on the order in which gradients were complete.
        """
        mean = max(1.0, self.summed) if self.accumulate > 1 else 1.0
        squared = math.fsum(self._squares) if all(map(math.isfinite, self._squares)) else math.nan
        norm = math.sqrt(squared) / mean
        self._scale = min(1.0, self.max_norm / (norm + NORM_EPSILON))
        return norm

    def apply_sum(self, count: int, parameter: Tensor, *states: Tensor) -> None:
        """Update a parameter from its sum, the last of its states, which this overwrites; `count` as in
        `GradientUpdate.apply`.
        """
        *own_states, total = states
        if self.accumulate > 1:
            total.div_(max(1.0, self.summed))
        if self._scale < 1.0:
            total.mul_(self._scale)
        self.make(count // self.accumulate, parameter, total, *own_states)

    def _squared(self, values: Tensor) -> float:
        """The sum of squares, in float64 and in pieces so small that one thread adds each up."""
        squared = 0.0
        for part in values.view(-1).split(NORM_ELEMENTS):
            wide = self._room[: part.numel()]
            wide.copy_(part)
            squared += wide.mul_(wide).sum().item()
        return squared


class Perturbation:
    """MeZO. The noise z of a parameter is not stored: it is drawn again from seed, step and name each time it is
    needed.
    """

    def __init__(self, optimizer: MeZO, seed: int) -> None:
        import torch

        self.optimizer = optimizer
        self.seed = seed
        self._generator = torch.Generator()
        self._step = 0

    def begin(self, step: int) -> None:
        """Begin step `step`, counted from 1; the calls until the next `begin` belong to it."""
        self._step = step

    def shift(self, name: str, parameter: Tensor, times: int) -> None:
        """Add `times` * epsilon * z to the parameter in place."""
        parameter.add_(self.noise(name, parameter), alpha=times * self.optimizer.epsilon)

    def apply(self, name: str, parameter: Tensor, upper: float, lower: float) -> None:
        """Return the parameter from value - epsilon * z to its value, and take one step of SGD along z, in place.

        `upper` and `lower` are the losses at value + epsilon * z and value - epsilon * z, whose difference gives the
        slope.
        """
        epsilon, rate = self.optimizer.epsilon, self.optimizer.rate(self._step)
        z = self.noise(name, parameter)
        slope = (upper - lower) / (2 * epsilon)
        if self.optimizer.weight_decay:
            parameter.add_(z, alpha=epsilon).mul_(1 - rate * self.optimizer.weight_decay)
            parameter.add_(z, alpha=-rate * slope)
        else:
            parameter.add_(z, alpha=epsilon - rate * slope)

    def noise(self, name: str, parameter: Tensor) -> Tensor:
        """z ~ N(0, 1) in the shape of `parameter`, float32: the same for every plan and every call within a step."""
        import torch

        key = hashlib.sha256(f"{self.seed}:{self._step}:{name}".encode()).digest()
        self._generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
        return torch.empty_like(parameter).normal_(generator=self._generator)
