"""Two small image models for `tightfit profile examples.vision:residual_cnn` and `...:vision_transformer`.

A factory takes no arguments and returns a module and a sample batch. The module's forward takes the batch and returns
the scalar loss; all its parameters are trained. The models use group and layer normalisation, whose results do not
depend on the other samples of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.skip = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResidualCnn(nn.Module):
    """A ResNet as used for CIFAR: three stages of two blocks each."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        widths = [
            (width, width, 1),
            (width, width, 1),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 1),
            (2 * width, 4 * width, 2),
            (4 * width, 4 * width, 1),
        ]
        self.blocks = nn.ModuleList(ResidualBlock(*w) for w in widths)
        self.classify = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.classify(x.mean((2, 3))), labels)


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(attended)
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class VisionTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2020)."""

    def __init__(
        self, image: int = 32, patch: int = 4, width: int = 96, depth: int = 4, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.classify(self.norm(x).mean(1)), labels)


def residual_cnn() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return ResidualCnn(), (torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))


def vision_transformer() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return VisionTransformer(), (torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))
