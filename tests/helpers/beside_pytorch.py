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


def traced_of(module: nn.Module, batch: tuple[Tensor, ...]) -> Trace:
    return trace(module, {f"batch{index}": tensor for index, tensor in enumerate(batch)})


def compared(module: nn.Module, batch: tuple[Tensor, ...], folder, change: Callable[[Trace], Any] = lambda _: None):
    traced = traced_of(module, batch)
    change(traced)
    beside = GradientComparison("own.module", module, batch, traced)
    assert beside.why_not(folder) is None
    request = beside.request(folder)
    programs = [program.model_dump() for program in traced.programs]
    guard, scratch = OutputGuard(), ScratchStores(folder)
    with torch.no_grad():
        for program in programs:
            settle_operators(program, guard, scratch)
        take_steps(request, programs)
    return beside.conclude(folder)
