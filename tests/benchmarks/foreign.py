"""Networks of timm as factories for tightfit, of families that no test has: what `truth.py` plans and runs.

``pip install timm`` brings them; weights are random, since no value of theirs changes a peak or a second.
"""

from __future__ import annotations

from functools import partial

import timm
import torch
from torch import Tensor, nn

NETWORKS = {
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
"""name -> pixels of a side of the images, of which a batch has eight"""
ROWS, CLASSES = 8, 1000


def factory(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor], nn.Module]:
    """The network, a batch of random images and its loss function."""
    side, generator = NETWORKS[name], torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, side, side, generator=generator)
    return (
        timm.create_model(name),
        (images, torch.randint(0, CLASSES, (ROWS,), generator=generator)),
        nn.CrossEntropyLoss(),
    )


for _name in NETWORKS:
    globals()[_name] = partial(factory, _name)
