"""The loss of pairs and its weights of tokens, against TRL's formulas under autograd; the file of references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trl_losses import dpo, orpo

from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.training.pair_scores import PairScores
from tightfit.runtime.engine.training.references import HEADER_BYTES, References

PAIRS, SEQ, WORDS, BETA = 3, 11, 17, 0.3


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, labels of answers, labels of prompts and answers, places where answers begin); answers of 1 to 6
    tokens.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * PAIRS, SEQ, WORDS, generator=generator, requires_grad=True)
    tokens = torch.randint(0, WORDS, (2 * PAIRS, SEQ), generator=generator)
    labels, whole = torch.full_like(tokens, -100), torch.full_like(tokens, -100)
    starts = torch.tensor([3, 3, 0, 0, 5, 5])
    for row, (start, length) in enumerate(zip(starts.tolist(), [4, 6, 2, 5, 1, 3])):
        labels[row, start : start + length] = tokens[row, start : start + length]
        whole[row, : start + length] = tokens[row, : start + length]
    return logits, labels, whole, starts


def known_of(starts: torch.Tensor, references: torch.Tensor | None = None) -> torch.Tensor:
    """What is known of the places of rows whose answers begin at `starts`, one answer to a row."""
    numbers = torch.arange(len(starts))[:, None].expand(-1, SEQ)
    answers = torch.where(torch.arange(SEQ) >= starts[:, None], numbers, -1).double()
    return torch.stack([answers] if references is None else [answers, references[:, None].expand(-1, SEQ)])


def own(loss: str, token_losses: torch.Tensor, labels: torch.Tensor, known: torch.Tensor) -> tuple[float, torch.Tensor]:
    made, weights = torch.empty(()), torch.empty(token_losses.shape)
    OPERATORS["tightfit.preference_loss"](token_losses, labels, known, loss, BETA, out=(made, weights))
    return float(made), weights


def losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_loss_weights_and_scores_are_those_of_trl(loss: str) -> None:
    logits, labels, whole, starts = batch()
    references = torch.linspace(-9.0, -4.0, 2 * PAIRS, dtype=torch.float64)
    known = known_of(starts, references if loss == "dpo" else None)
    trl = dpo(logits, labels, references, BETA) if loss == "dpo" else orpo(logits, labels, whole, BETA)
    trl["loss"].backward()
    if loss == "orpo":
        labels[0::2] = whole[0::2]
    again = logits.detach().requires_grad_()
    token_losses = losses_of(again, labels)
    made, weights = own(loss, token_losses.detach(), labels, known)
    assert made == pytest.approx(float(trl["loss"].detach()), rel=1e-6)
    token_losses.backward(weights)
    torch.testing.assert_close(again.grad, logits.grad, rtol=1e-5, atol=1e-7)
    scores = PairScores(OPERATORS["tightfit.preference_scores"], loss, BETA)
    scores.add_pairs(token_losses.detach(), [labels, labels, known], PAIRS)
    told = scores.result(0.0)
    for name, value in trl.items():
        assert told[name] == pytest.approx(float(value.detach()), rel=1e-6), name
    assert told["pairs"] == PAIRS
    # The same where answers lie in any rows, two in each, those of a pair apart.
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    shared = [one.view(-1, 2 * SEQ) for one in (token_losses.detach().view(-1, SEQ)[order], labels[order])]
    packed, packed_weights = own(loss, shared[0].flatten(), shared[1], known[:, order].reshape(len(known), -1, 2 * SEQ))
    assert packed == pytest.approx(made, rel=1e-6)
    torch.testing.assert_close(packed_weights.view(-1, SEQ), weights.view(-1, SEQ)[order])


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_rows_without_a_pair_change_nothing(loss: str) -> None:
    """As in the last batch of an evaluation."""
    logits, labels, _, starts = batch()
    known = known_of(starts, torch.zeros(2 * PAIRS, dtype=torch.float64) if loss == "dpo" else None)
    token_losses = losses_of(logits, labels).detach()
    two = own(loss, token_losses[: 4 * SEQ], labels[:4], known[:, :4])
    labels[4:] = -100
    three = own(loss, losses_of(logits, labels).detach(), labels, known)
    assert three[0] == two[0]
    assert torch.equal(three[1][: 4 * SEQ], two[1])
    assert not three[1][4 * SEQ :].any()


def test_answers_that_are_certain_have_a_finite_loss() -> None:
    labels = torch.zeros(2, 2, dtype=torch.int64)
    made, weights = own("orpo", torch.zeros(4), labels, torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], dtype=torch.float64))
    assert made == pytest.approx(BETA * 0.6931472, rel=1e-5)
    assert weights.isfinite().all()


def test_references_are_kept_one_by_one_and_begin_anew_for_another_model(tmp_path: Path) -> None:
    path = str(tmp_path / "train.references")
    with References(path, pairs=3, fingerprint={"weights": "a"}) as first:
        first.put(2, -3.5, -4.25)
        assert [first.get(pair) for pair in range(3)] == [None, None, (-3.5, -4.25)]
    with References(path, pairs=3, fingerprint={"weights": "a"}) as again:
        assert again.get(2) == (-3.5, -4.25)
        again.put(0, 0.0, 0.0)
        assert again.get(0) == (0.0, 0.0)
    with Path(path).open("r+b") as file:
        file.seek(HEADER_BYTES + 2 * 20)
        file.write(b"\x01")
    with References(path, pairs=3, fingerprint={"weights": "a"}) as damaged:
        assert [damaged.get(pair) for pair in range(3)] == [(0.0, 0.0), None, None]
    with References(path, pairs=3, fingerprint={"weights": "b"}) as other:
        assert [other.get(pair) for pair in range(3)] == [None] * 3
