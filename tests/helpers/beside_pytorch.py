"""A module's traced steps beside those of PyTorch, as profiling compares them, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.profiles.measuring.guard import OutputGuard
from tightfit.profiles.measuring.worker import ScratchStores, settle_operators, take_steps
from tightfit.profiles.tracing.comparison import GradientComparison
from tightfit.profiles.tracing.trace import trace
from tightfit.profiles.tracing.traced import Trace


def traced_of(module: nn.Module, batch: tuple[Tensor, ...], *, evaluated: bool = False) -> Trace:
    return trace(module, {f"batch{index}": tensor for index, tensor in enumerate(batch)}, evaluated=evaluated)


def compared(module: nn.Module, batch: tuple[Tensor, ...], folder, change: Callable[[Trace], Any] = lambda _: None):
    return beside(module, batch, folder, change).told


def beside(
    module: nn.Module,
    batch: tuple[Tensor, ...],
    folder,
    change: Callable[[Trace], Any] = lambda _: None,
    *,
    evaluated: bool = False,
):
    """The comparison, with what it `told`."""
    traced = traced_of(module, batch, evaluated=evaluated)
    change(traced)
    comparison = GradientComparison("own.module", module, batch, traced)
    assert comparison.why_not(folder) is None
    request = comparison.request(folder)
    programs = [program.model_dump() for program in traced.programs]
    guard, scratch = OutputGuard(), ScratchStores(folder)
    with torch.no_grad():
        for program in programs:
            settle_operators(program, guard, scratch)
        take_steps(request, programs)
    comparison.told = comparison.conclude(folder)
    return comparison
