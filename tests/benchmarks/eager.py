"""Networks with batches and losses as a training script has them, and that script in eager PyTorch, for `modules.py`
and `truth.py`.

``python eager.py NAME STEPS THREADS`` trains one of them and prints a JSON line: the loss and seconds of every step,
and the process's peak in bytes (VmHWM). It imports PyTorch, and timm for networks of timm, and nothing of tightfit.
Each name of `NETWORKS` is also a function: the factory for tightfit, of the same initial values, since both call it
with PyTorch's generator seeded with 0.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import torch
from torch import Tensor, nn

LR = 2e-4
"""the learning rate of both, with AdamW's other defaults and no weight decay"""
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network with its batches."""

    title: str
    make: Callable[[], nn.Module]
    parameters: int | None = None
    """as published, or counted by those who published it; None: a library makes the network"""
    batch: Callable[[torch.Generator], Batch]
    size: str
    """of a batch, in words"""


def _images(rows: int, side: int, classes: int, targets: tuple[int, ...], generator: torch.Generator) -> Batch:
    images = torch.randn(rows, 3, side, side, generator=generator)
    return images, torch.randint(0, classes, targets, generator=generator)


def _words(tokens: int, rows: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(0, 10_000, (tokens + 1, rows), generator=generator)
    return ids[:-1].clone(), ids[1:].flatten()


def _rows_of_words(rows: int, tokens: int, generator: torch.Generator) -> Batch:
    inputs, targets = _words(tokens, rows, generator)
    return inputs.T.contiguous(), targets.view(tokens, rows).T.flatten()


def _timm(name: str) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name)
    return made


_relu = partial(nn.ReLU, inplace=True)
NETWORKS = {
    "resnet50": Network(
        title="ResNet-50",
        make=lambda: architectures.resnet50(act=_relu),
        parameters=25_557_032,
        batch=partial(_images, 8, 224, 1000, (8,)),
        size="8 × 3 × 224 × 224",
    ),
    "vit": Network(
        title="ViT-S/16",
        make=architectures.VisionTransformer,
        parameters=22_050_664,
        batch=partial(_images, 8, 224, 1000, (8,)),
        size="8 × 3 × 224 × 224",
    ),
    "unet": Network(
        title="U-Net",
        make=lambda: architectures.UNet(act=_relu),
        parameters=31_031_810,
        batch=partial(_images, 2, 224, 2, (2, 224, 224)),
        size="2 × 3 × 224 × 224",
    ),
    "lstm": Network(
        title="LSTM",
        make=architectures.LstmLanguageModel,
        parameters=19_780_400,
        batch=partial(_words, 70, 40),
        size="70 × 40 words",
    ),
    "gpt": Network(
        title="GPT-2, 124M",
        make=architectures.Gpt,
        parameters=124_439_808,
        batch=partial(_rows_of_words, 4, 128),
        size="4 × 128 tokens",
    ),
}
TIMM = {
    "convnext_pico": 160,
    "mobilenetv3_large_100": 160,
    "efficientnet_b0": 160,
    "densenet121": 160,
    "resnext50_32x4d": 160,
    "regnety_016": 160,
    "swin_tiny_patch4_window7_224": 224,
    "mixer_s16_224": 224,
    "xcit_nano_12_p16_224": 224,
    "poolformer_s12": 160,
}
"""networks of timm of families that no test has -> pixels of a side of their images"""
NETWORKS |= {
    name: Network(
        title=name,
        make=partial(_timm, name),
        batch=partial(_images, 8, side, 1000, (8,)),
        size=f"8 × 3 × {side} × {side}",
    )
    for name, side in TIMM.items()
}


def batches(name: str, count: int) -> list[Batch]:
    """The first batches of a network: always the same ones."""
    generator = torch.Generator().manual_seed(1)
    return [NETWORKS[name].batch(generator) for _ in range(count)]


def factory(name: str) -> tuple[nn.Module, Batch, nn.Module]:
    """The network, its first batch and its loss function."""
    module = NETWORKS[name].make()
    return module, batches(name, 1)[0], nn.CrossEntropyLoss()


globals().update({name: partial(factory, name) for name in NETWORKS})


def train(name: str, steps: int, threads: int) -> dict[str, Any]:
    """Train as a PyTorch script does, with AdamW's fused kernel, and return losses, seconds of each step, and the
    peak.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module, _, loss_fn = factory(name)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0, fused=True)
    losses, seconds = [], []
    for inputs, targets in batches(name, steps):
        begin = time.perf_counter()
        loss = loss_fn(module(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return {"losses": losses, "seconds": seconds, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], *map(int, sys.argv[2:]))))
