"""Shows how to train modules of your own from Python: factory, batches, profile, plan, run, and loading the result.

    python examples/own_module.py [--out DIRECTORY]

Trains a small CNN and a small transformer on made-up data, each with a budget 10 MiB above the
smallest possible one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tightfit import minimum_budget, plan, profile, run

SAMPLES, CLASSES, WORDS, LENGTH = 16, 4, 50, 12
Batch = tuple[Tensor, Tensor]


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.conv2, self.classify = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Linear(32, CLASSES)

    def logits(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(images)))))
        logits: Tensor = self.classify(x.amax((2, 3)))
        return logits

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images), labels)


class TextClassifier(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.classify = nn.Linear(width, CLASSES)

    def logits(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.classify(x.mean(1))
        return logits

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(words), labels)


def images(count: int, seed: int) -> Iterator[Batch]:
    """Yield `count` batches of noise images with a bright square in one corner; the square's size shows the class."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        pixels = torch.randn(SAMPLES, 1, 16, 16, generator=generator) * 0.3
        labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        for image, label in zip(pixels, labels.tolist(), strict=True):
            image[:, : 2 + label, : 2 + label] += 2.0
        yield pixels, labels


def texts(count: int, seed: int) -> Iterator[Batch]:
    """Yield `count` batches of random words, of which the fourth to sixth are the number of the class."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        words = torch.randint(CLASSES, WORDS, (SAMPLES, LENGTH), generator=generator)
        labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        words[:, 3:6] = labels[:, None]
        yield words, labels


def cnn() -> tuple[nn.Module, Batch]:
    """A factory as `profile` takes it: no arguments; returns a module whose forward returns the loss, and a sample
    batch.
    """
    return Cnn(), next(images(1, seed=0))


def text_classifier() -> tuple[nn.Module, Batch]:
    return TextClassifier(), next(texts(1, seed=0))


def train(
    factory: str, module: Cnn | TextClassifier, batches: Callable[[int, int], Iterator[Batch]], out: Path
) -> float:
    """Train under a cap, load the result into `module` and return its accuracy on held-out data."""
    measured = profile(factory)
    planned = plan(measured, minimum_budget(measured) + (10 << 20))
    report = run(
        planned, batches(60, 1), steps=180, out=out, overwrite=True, lr=3e-3, eval_data=batches(5, 2)
    )  # three passes over the 60 batches, in order
    module.load_state_dict(load_file(out / "model" / "model.safetensors"))
    module.eval()
    with torch.no_grad():
        right = [(module.logits(x).argmax(1) == y).float().mean() for x, y in batches(5, 2)]
    accuracy = float(torch.stack(right).mean())
    before, after = (report["evaluation"][when]["loss"] for when in ("before", "after"))
    peak, cap = report["peak_bytes"]["measured"] / 2**20, report["budget_bytes"] / 2**20
    print(f"{factory}: {peak:.0f} of {cap:.0f} MiB, held-out loss {before:.3f} → {after:.3f}, accuracy {accuracy:.2f}")
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="Train two modules from Python, each under its cap.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out" / "own_module")
    out = parser.parse_args().out
    train("examples.own_module:cnn", Cnn(), images, out / "cnn")
    train("examples.own_module:text_classifier", TextClassifier(), texts, out / "text_classifier")


if __name__ == "__main__":
    main()
