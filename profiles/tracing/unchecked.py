"""Switches off what a trace has no use for: PyTorch's checks of argument values in losses and distributions, where
tensors have no values, and torch.compile.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.distributions import Distribution
from torch.nn.functional import gaussian_nll_loss


def compile_off() -> contextlib.AbstractContextManager[object]:
    """Within this context functions that torch.compile made run as they are written."""
    loaded = "torch._dynamo" in sys.modules  # else nothing was compiled
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Within this context distributions validate no arguments, and `gaussian_nll_loss` assumes positive variances."""
    torch_any = torch.any

    def any_of(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_code is gaussian_nll_loss.__code__:
            return False
        return torch_any(*args, **kwargs)

    with mock.patch.object(torch, "any", any_of), mock.patch.object(Distribution, "_validate_args", False):
        yield
