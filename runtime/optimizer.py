"""AdamW in place, one tensor at a time: a gradient can go as soon as its tensor is updated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Loshchilov and Hutter 2019, "Decoupled weight decay regularization", with PyTorch's defaults."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    """constant, linear or cosine decay to zero, after the warmup."""
    warmup_steps: int = 0
    total_steps: int = 0
    """Steps over which linear and cosine decay."""

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 1."""
        import math

        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        done = min(1.0, (step - 1 - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        if self.schedule == "linear":
            return self.lr * (1.0 - done)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.lr


class Update:
    """`apply` updates one trainable; the native fused kernel reads and writes each tensor once and makes no temporary."""

    def __init__(self, optimizer: AdamW) -> None:
        self.optimizer = optimizer
        self._kernel = torch._C._get_operation_overload("aten::_fused_adamw_", "")[0]
        self._step = torch.zeros((), dtype=torch.float32)
        self._rate = 0.0

    def begin(self, step: int) -> None:
        """Updates until the next `begin` belong to step `step`, counted from 1."""
        self._step.fill_(step)
        self._rate = self.optimizer.rate(step)

    def apply(self, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> None:
        """float32 tensors of one shape, contiguous; all but the gradient change in place."""
        optimizer = self.optimizer
        self._kernel(
            [parameter], [gradient], [first], [second], [], [self._step],
            lr=self._rate, beta1=optimizer.betas[0], beta2=optimizer.betas[1], weight_decay=optimizer.weight_decay,
            eps=optimizer.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
