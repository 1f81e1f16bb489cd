"""A module whose parameters have every number of dimensions: a number, long vectors, matrices, kernels of
convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FACTORY = f"{__name__}:mixed"
WIDTH = 1024


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 1, stride=4)
        self.images = nn.Sequential(first, nn.ReLU(), second)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.flat = nn.ParameterList(nn.Parameter(torch.randn(WIDTH * WIDTH) / WIDTH**0.5) for _ in range(3))
        self.body = nn.Sequential(
            nn.Linear(64 * 8 * 8, 256),
            nn.GELU(),
            nn.LayerNorm(256),
            nn.Linear(256, WIDTH),
            nn.GELU(),
        )
        self.last = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body((self.images(images) * self.scale).flatten(1))
        for flat in self.flat:
            x = torch.tanh(x @ flat.view(WIDTH, WIDTH))
        made: Tensor = self.last(x)
        return made


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """(images, labels) of four samples."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(0, 10, (4,), generator=generator)


def mixed() -> Any:
    torch.manual_seed(0)
    return Mixed(), batch(0), nn.CrossEntropyLoss()
