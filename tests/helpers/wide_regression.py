"""A module whose parameters are what takes memory: with them, their gradients and states on disk a plan needs far
less.
"""

from __future__ import annotations

import torch

FACTORY = f"{__name__}:regression"


def regression() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)

    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(256, 8192), torch.nn.GELU(), torch.nn.Linear(8192, 256))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.layers(x) - y).square().mean()

    return Regression(), (torch.randn(4, 256), torch.randn(4, 256))
