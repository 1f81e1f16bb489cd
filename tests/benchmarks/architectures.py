"""Published networks in plain PyTorch, for the benchmarks: VGG-16, ResNet-50, MobileNetV2, U-Net, ViT-S/16 and an LSTM
language model. Nothing of tightfit is imported, so that they can be trained without it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, kernel=3, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def block(inputs, outputs, kernel=3, stride=1, groups=1, act=nn.ReLU):
    return [conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), act()]


def vgg16(classes=1000):
    layers, width = [], 3
    for item in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if item == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU()]
            width = item
    head = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride, act=nn.ReLU):
        super().__init__()
        outputs = 4 * width
        parts = [*block(inputs, width, 1, act=act), *block(width, width, 3, stride, act=act), conv(width, outputs, 1)]
        self.body = nn.Sequential(*parts, nn.BatchNorm2d(outputs))
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.act = act()

    def forward(self, x):
        return self.act(self.body(x) + self.short(x))


def resnet50(classes=1000, act=nn.ReLU):
    """He et al. 2016, with the stride in the 3 x 3 convolutions, as torchvision has it."""
    layers = [*block(3, 64, 7, 2, act=act), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            layers.append(Bottleneck(inputs, width, stride if index == 0 else 1, act))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, classes))


class Inverted(nn.Module):
    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        hidden = inputs * expand
        parts = block(inputs, hidden, 1, act=nn.ReLU6) if expand != 1 else []
        parts += [*block(hidden, hidden, 3, stride, hidden, act=nn.ReLU6), conv(hidden, outputs, 1)]
        self.body = nn.Sequential(*parts, nn.BatchNorm2d(outputs))
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.skip else self.body(x)


def mobilenet_v2(classes=1000):
    layers = block(3, 32, 3, 2, act=nn.ReLU6)
    inputs = 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, outputs, count, stride in stages:
        for index in range(count):
            layers.append(Inverted(inputs, outputs, stride if index == 0 else 1, expand))
            inputs = outputs
    layers += [*block(320, 1280, 1, act=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015, padded convolutions, four levels."""

    def __init__(self, classes=2, width=64, act=nn.ReLU):
        super().__init__()
        widths = [width << level for level in range(5)]

        def double(inputs, outputs):
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1),
                act(),
                nn.Conv2d(outputs, outputs, 3, padding=1),
                act(),
            )

        self.down = nn.ModuleList([double(i, o) for i, o in zip([3, *widths], widths)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1])])
        self.merge = nn.ModuleList([double(2 * w, w) for w in reversed(widths[:-1])])
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        kept = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else self.pool(x))
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(kept[:-1])):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.last(x)


class EncoderBlock(nn.Module):
    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        attended = attended.transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2020 with a class token; the defaults are ViT-S/16 (Touvron et al. 2021)."""

    def __init__(self, classes=1000, image=224, patch=16, width=384, depth=12, heads=6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.classify = nn.Linear(width, classes)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.classify(self.norm(x[:, 0]))


class Gpt(nn.Module):
    """Radford et al. 2019: the smallest GPT-2, whose head is its embedding; dropout is left out."""

    def __init__(self, words=50_257, width=768, depth=12, heads=12, tokens=1024):
        super().__init__()
        self.embed, self.positions = nn.Embedding(words, width), nn.Embedding(tokens, width)
        for table in (self.embed, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        """ids [rows, tokens] -> logits [rows * tokens, words]."""
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight).flatten(0, 1)


class LstmLanguageModel(nn.Module):
    """Zaremba et al. 2014, the medium model: two layers of 650, 10,000 words; dropout is left out."""

    def __init__(self, words=10_000, width=650, layers=2):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, layers)
        self.head = nn.Linear(width, words)

    def forward(self, ids):
        """ids [tokens, rows] -> logits [tokens * rows, words]."""
        made, _ = self.lstm(self.embed(ids))
        return self.head(made).flatten(0, 1)
