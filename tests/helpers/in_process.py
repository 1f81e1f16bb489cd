"""Trains a plan inside the test process, with the executor that the training process of a run uses and no child
process.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_plans import CONFIG

from tightfit.planner.schema import Plan
from tightfit.runtime.data.tokenization import prepare
from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.kernels.optimizer import OPTIMIZERS
from tightfit.runtime.engine.training.adapter import BODY
from tightfit.runtime.engine.training.records import RecordWriter
from tightfit.runtime.engine.training.trainer import Training
from tightfit.runtime.session.job_compiler import compile_job


def random_records(folder: Path, *, seq: int, vocab_size: int = 512) -> str:
    """A file of prepared data in `folder`: random tokens."""
    made = prepare("random", None, folder, seq=seq, vocab_size=vocab_size, seed=3)
    made.close()
    return str(made.path)


def drawn_records(path: Path, count: int, seed: int, *, seq: int, questions: bool = False) -> str:
    """A file of `count` prepared samples of random tokens, or of as many questions with two choices each."""
    drawn, words = random.Random(seed), CONFIG["vocab_size"]
    with RecordWriter(path, seq=seq, pad_token=0, vocab_size=words, source="drawn") as writer:
        for example in range(count):
            tokens = [drawn.randrange(words) for _ in range(seq + 1)]
            for choice in range(2) if questions else (-1,):
                labels = tokens[1:] if choice <= 0 else tokens[:-1]
                writer.add(tokens[:-1], labels, example=example, choice=choice, answer=choice == 0)
    return str(path)


class LazyChannel(TransferChannel):
    """The slowest correct channel: a transfer happens only when somebody waits for it (or for a later one)."""

    def __init__(self) -> None:
        self._queue: deque[tuple[int, Callable[..., object], tuple[Any, ...]]] = deque()
        self._issued = 0

    def submit(self, transfer: Callable[..., object], *arguments: Any) -> int:
        self._issued += 1
        self._queue.append((self._issued, transfer, arguments))
        return self._issued

    def wait(self, ticket: int) -> None:
        while self._queue and self._queue[0][0] <= ticket:
            _, transfer, arguments = self._queue.popleft()
            transfer(*arguments)

    def close(self) -> None:
        self.drain()


def make_training(
    plan: Plan,
    records: str,
    directory: Path,
    *,
    lr: float,
    seed: int = 7,
    packing: bool = False,
    channel: TransferChannel | None = None,
    device: Device | None = None,
) -> Training:
    """Compile a plan into a job and load it. `records` is a file of prepared data; `device` replaces the plan's own."""
    optimizer = OPTIMIZERS[plan.optimizer["name"]](lr=lr)
    settings = {
        "store": plan.model.store,
        "data": records,
        "evaluation": records,
        "packing": packing,
        "requests": None,
        "out": str(directory),
        "steps": 1,
        "seed": seed,
        "base_model": "tiny",
        "adapter_body": plan.model.config.get("adapter_body", BODY),
        "optimizer": dataclasses.asdict(optimizer),
        "expected_seconds": plan.step_seconds,
        "preference": plan.model.preference.model_dump() if plan.model.preference else None,
    }
    return Training(compile_job(plan, settings), channel or TransferChannel(), str(directory), device)


def train(
    plan: Plan,
    records: str,
    folder: Path,
    steps: int,
    *,
    lr: float,
    seed: int = 7,
    channel: TransferChannel | None = None,
) -> tuple[list[float], bytes, bytes]:
    """The losses of some steps, and the files of the adapter and of the optimizer's state, which are left in
    `folder`.
    """
    folder.mkdir(exist_ok=True)
    training = make_training(plan, records, folder, lr=lr, seed=seed, channel=channel)
    training.initialise()
    losses = [training.step(number) for number in range(1, steps + 1)]
    training.save_state(str(folder))
    training.close()
    return losses, *((folder / name).read_bytes() for name in ("adapter_model.safetensors", "optimizer.safetensors"))
