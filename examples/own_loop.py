"""Shows a PyTorch training loop of your own under a memory cap, with early stopping.

    python examples/own_loop.py [--out DIRECTORY]

The loop runs the steps of a plan through a `Session`. It trains the CNN of `own_module.py` with a budget 10 MiB above
the smallest possible one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.own_module import SAMPLES, images
from tightfit import Session, minimum_budget, plan, profile


def train(out: Path, rate: float = 3e-3, patience: int = 3, enough: float = 0.02) -> tuple[Path, int, float]:
    """Train until the held-out loss is at most `enough`, or has failed to reach a new minimum in `patience` passes.

    Each pass without a new minimum halves the learning rate. Returns (best checkpoint, steps taken, least held-out
    loss).
    """
    pixels, labels = (torch.cat(parts) for parts in zip(*images(40, 1), strict=True))
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=SAMPLES, shuffle=True)
    held_out, least, bad, best = list(images(5, 2)), float("inf"), 0, out
    measured = profile("examples.own_module:cnn")
    planned = plan(measured, minimum_budget(measured) + (10 << 20))
    # checkpoint_every=0: only `session.save` makes checkpoints, and the latest two of them are kept.
    with Session(planned, out=out, overwrite=True, checkpoint_every=0) as session:
        while bad < patience and least > enough:
            for batch in loader:
                session.step(*batch, lr=rate)
            loss = sum(session.loss(*batch) for batch in held_out) / len(held_out)
            if loss < least:
                least, bad, best = loss, 0, session.save()
            else:
                rate, bad = rate / 2, bad + 1
    return best, session.taken, least


def main() -> None:
    parser = argparse.ArgumentParser(description="Train in a loop of one's own, under its cap.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out" / "own_loop")
    best, steps, loss = train(parser.parse_args().out)
    print(f"ended after {steps} steps; the least held-out loss is {loss:.4f}, of {best / 'model.safetensors'}")


if __name__ == "__main__":
    main()
