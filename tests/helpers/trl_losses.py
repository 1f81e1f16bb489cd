"""The losses of TRL on pairs of answers, in plain PyTorch: `DPOTrainer` with its sigmoid loss, and `ORPOTrainer`.

A batch has the chosen answers in its even rows and the rejected ones in its odd rows. Labels are already shifted:
labels[t] is the token that place t predicts, or -100.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reference import stored_weights, take
from torch import Tensor
from torch.nn import functional as F

from tightfit.profiles.schema import Profile
from tightfit.runtime.engine.training.adapter import BODY
from tightfit.runtime.engine.training.pairs import PairBatches
from tightfit.runtime.engine.training.records import RecordFile


def answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(summed log-probabilities of the labels of each row, their number), as TRL's `get_batch_logps`."""
    mask = labels != -100
    per_token = logits.log_softmax(-1).gather(2, labels.masked_fill(~mask, 0).unsqueeze(2)).squeeze(2)
    return (per_token * mask).sum(-1), mask.sum(-1)


def dpo(logits: Tensor, labels: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """The sigmoid loss of Rafailov et al. 2023, with what TRL logs; `reference`: summed log-probabilities of each
    row.
    """
    sums, _ = answers(logits, labels)
    ratios = sums - reference
    losses = -F.logsigmoid(beta * (ratios[0::2] - ratios[1::2]))
    rewards = beta * ratios.detach()
    return scored(losses.mean(), rewards)


def orpo(logits: Tensor, labels: Tensor, whole: Tensor, beta: float) -> dict[str, Tensor]:
    """Hong et al. 2024: `whole` are the labels of prompt and answer, over which TRL takes the likelihood of chosen
    rows.
    """
    sums, counts = answers(logits, labels)
    chosen, rejected = (sums / counts)[0::2], (sums / counts)[1::2]
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    likelihood = F.cross_entropy(logits[0::2].flatten(0, 1), whole[0::2].flatten(), ignore_index=-100)
    loss = likelihood - (beta * F.logsigmoid(log_odds)).mean()
    return scored(loss, beta * (sums / counts).detach())


def scored(loss: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    chosen, rejected = rewards[0::2], rewards[1::2]
    return {
        "loss": loss,
        "reward_accuracy": (chosen > rejected).float().mean(),
        "reward_margin": (chosen - rejected).mean(),
    }


def rows_of(records: Path, pairs: list[int], seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, labels of the answers, labels of prompt and answer) of the rows of these pairs of a prepared file."""
    count = 2 * len(pairs)
    ids = torch.zeros(count, seq, dtype=torch.int64)
    labels, whole = torch.full((count, seq), -100), torch.full((count, seq), -100)
    with RecordFile.open(records) as opened:
        for row in range(count):
            record = opened.read(2 * pairs[row // 2] + row % 2)
            end = record.length
            ids[row, :end], labels[row, :end] = record.input_ids, record.labels
            whole[row, : end - 1] = record.input_ids[1:]
            whole[row, end - 1] = record.labels[-1]
    return ids, labels, whole


def loss_of_pairs(
    loss: str, model: Callable[..., Tensor], rows: tuple[Tensor, Tensor, Tensor], reference: Tensor | None, beta: float
) -> dict[str, Tensor]:
    """The loss of a batch `rows`; `model(ids)` gives logits, `reference` is that of DPO for each row."""
    ids, labels, whole = rows
    logits = model(ids).float()
    if loss == "orpo":
        return orpo(logits, labels, whole, beta)
    assert reference is not None
    return dpo(logits, labels, reference, beta)


# --- of tightfit's profiles and runs ----------------------------------------------------------------------------------


def base_of(made: Profile, dtype: torch.dtype = torch.float32) -> Any:
    """The base of a profile in transformers, with the values of the store."""
    import transformers

    config = {name: value for name, value in made.model.config.items() if name not in ("adapter_base", "preference")}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    )
    take(model.eval(), stored_weights(made.model.store), config, config.get("adapter_body", BODY))
    return model.to(dtype)


def reference_of(model: Any, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Log-probabilities of the answers with the adapter off."""
    with torch.no_grad(), model.disable_adapter():
        return answers(model(input_ids=rows[0]).logits.float(), rows[1])[0]


def theirs_of(loss: str, model: Any, rows: tuple[Tensor, Tensor, Tensor], beta: float) -> dict[str, Tensor]:
    """The loss of a batch `rows` by a model of peft, which is its own reference with the adapter off."""
    reference = reference_of(model, rows) if loss == "dpo" else None
    return loss_of_pairs(loss, lambda ids: model(input_ids=ids).logits, rows, reference, beta)


def pairs_of_steps(out: Path, steps: int, pairs: int, loss: str) -> list[list[int]]:
    """The pairs in the batches of the first steps of a run in `out`."""
    opened = PairBatches(str(out / "data" / "train.records"), 0, loss)
    found = [opened.of_step(step, pairs) for step in range(steps)]
    opened.close()
    return found
