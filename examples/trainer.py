"""Shows Hugging Face's Trainer under a memory cap: the steps are those of a plan, everything else is the Trainer's.

    python examples/trainer.py [--out DIRECTORY]

Trains a small language model made up here with a budget 10 MiB above the smallest possible one. Needs transformers and
accelerate.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import Tensor, nn

from tightfit import Session, minimum_budget, plan, profile

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
ROWS, TOKENS = 8, 24


class PlannedTrainer(transformers.Trainer):
    """Hugging Face's Trainer, with steps that a `Session` runs.

    The Trainer does data, learning rates, logging, callbacks and the schedule of evaluations; the session does forward,
    backward, AdamW, weight decay and checkpoints. The Trainer must take each batch for an update, so leave
    `gradient_accumulation_steps` at 1 and profile with `accumulate` instead. Gradients are clipped where the plan says
    so (`plan(..., max_grad_norm=1.0)`), and their norm is logged then; the Trainer's own `max_grad_norm` has no effect.
    """

    def __init__(self, session: Session, **options: Any) -> None:
        # A dummy module that is not trained: the Trainer needs one to make an optimizer, whose learning rate it
        # schedules.
        super().__init__(model=nn.Linear(1, 1), **options)
        self.session = session

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        assert self.optimizer is not None
        rate = self.optimizer.param_groups[0]["lr"]
        return torch.tensor(self.session.step(inputs["input_ids"], inputs["labels"], lr=rate))

    def log(self, logs: dict[str, float], *others: Any) -> None:
        logs.pop("grad_norm", None)  # the dummy module's
        if "loss" in logs and self.session.grad_norm is not None:
            logs["grad_norm"] = self.session.grad_norm
        super().log(logs, *others)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        return torch.tensor(self.session.loss(inputs["input_ids"], inputs["labels"])), None, None


def counting(count: int, seed: int) -> list[dict[str, list[int]]]:
    """`count` samples of token ids that rise by one from a random start, so that the next one can be learned."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, CONFIG["vocab_size"], (count,), generator=generator).tolist()
    texts = [[(start + at) % CONFIG["vocab_size"] for at in range(TOKENS)] for start in starts]
    return [{"input_ids": text, "labels": text} for text in texts]


def train(
    out: Path, steps: int = 200, max_grad_norm: float | None = 1.0
) -> tuple[float, float, list[dict[str, float]]]:
    """Train for `steps` steps with gradients clipped to a norm, or not; returns the held-out loss before and after, and
    what was logged.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG))
    measured = profile(str(out / "config.json"), batch=ROWS, seq=TOKENS)
    least = minimum_budget(measured, max_grad_norm=max_grad_norm)
    planned = plan(measured, least + (10 << 20), max_grad_norm=max_grad_norm)
    with Session(planned, out=out / "session", overwrite=True) as session:
        options = transformers.TrainingArguments(
            output_dir=str(out / "trainer"), per_device_train_batch_size=ROWS, per_device_eval_batch_size=ROWS,
            max_steps=steps,
            learning_rate=2e-2, lr_scheduler_type="cosine", warmup_steps=10, logging_steps=50, save_strategy="no",
            remove_unused_columns=False, report_to=[], use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = PlannedTrainer(session, args=options, train_dataset=counting(400, 1), eval_dataset=counting(32, 2))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, trainer.evaluate()["eval_loss"], trainer.state.log_history


def main() -> None:
    parser = argparse.ArgumentParser(description="Train by Hugging Face's Trainer, under a cap.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out" / "trainer")
    before, after, _ = train(parser.parse_args().out)
    print(f"held-out loss: {before:.3f} → {after:.3f}")


if __name__ == "__main__":
    main()
