"""The losses of pairs of answers, of which one was chosen and the other rejected: DPO and ORPO, as functions of token losses.

A batch has two rows for each pair, the chosen answer and below it the rejected one, each behind the prompt. Both losses depend on
a row through one number alone, the log-probability of its answer. So the gradient of a token's logits is that of its own
negative log-likelihood, times a factor that all tokens of an answer share: `preference_loss` makes these factors, and a loss head
that has folded all slices of the vocabulary needs no second pass over them (`tightfit.runtime.engine.cpu.operators.head_weighted`).

Shapes: P pairs, 2P rows of S places, T = 2P * S. Sums are made in float64.

Sources: Rafailov et al. 2023, "Direct Preference Optimization" (DPO); Hong et al. 2024, "ORPO: Monolithic Preference
Optimization without Reference Model"; both as `DPOTrainer` (its sigmoid loss) and `ORPOTrainer` of TRL have them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DPO, ORPO = "dpo", "orpo"
NEAREST = -1e-12
"""largest mean log-probability that ORPO tells from 0, at which the odds are infinite"""


def preference_loss(
    token_losses: Tensor, labels: Tensor, known: Tensor, loss: str, beta: float, *, out: Sequence[Tensor]
) -> None:
    """The mean loss of a batch's pairs, and its derivative by each token's negative log-likelihood.

    token_losses float32 [T], 0 where there is no label; labels int64 [2P, S], below 0 for none. `known` is for DPO the
    log-probability of each answer in the reference model, float64 [2P]; for ORPO the place from which on a row's labels are
    those of its answer, int64 [2P]: labels before it, of the prompt, count in the likelihood of the chosen row alone. Pairs
    without a label in both answers are left out.

    out: loss float32 [], weights float32 [T].
    """
    total, weights = out
    answered = answer_places(labels, known if loss == ORPO else None)
    sums, counts = log_probabilities(token_losses, answered)
    complete = (counts.view(-1, 2) > 0).all(1)
    pairs = complete.sum().clamp_(min=1)
    margins, rise = _compared(sums, counts, known, loss, beta)
    terms = _terms(margins, loss, beta)
    mean_loss = torch.where(complete, terms, 0.0).sum() / pairs
    # d loss / d log-probability is - sigmoid(-margin) * rise for the chosen answer and the opposite for the rejected one.
    share = torch.where(complete, torch.sigmoid(margins.neg()), 0.0) / pairs
    factors = rise.view(-1, 2) * share[:, None]
    factors[:, 1].neg_()
    token_weights = torch.where(answered, factors.view(-1, 1), 0.0)
    if loss == ORPO:
        counted = labels >= 0
        counted[1::2] = False
        count = counted.sum().clamp_(min=1)
        mean_loss += torch.where(counted, token_losses.view(labels.shape), 0.0).double().sum() / count
        token_weights += counted.double().div_(count)
    total.copy_(mean_loss)
    weights.copy_(token_weights.view(-1))


def _compared(sums: Tensor, counts: Tensor, known: Tensor, loss: str, beta: float) -> tuple[Tensor, Tensor]:
    """(by what the chosen answers are ahead, as logits float64 [P]; the absolute derivative of the loss of a pair by the
    log-probability of each answer over sigmoid of minus these logits, float64 [2P]).
    """
    if loss == DPO:
        ahead, rise = rewards(sums, counts, known, loss, beta), torch.full_like(sums, beta)
    else:
        mean = (sums / counts.clamp(min=1)).clamp_(max=NEAREST)
        rest = torch.expm1(mean).neg_()  # 1 - p
        ahead, rise = mean - rest.log(), beta / (rest * counts.clamp(min=1))  # log of the odds p / (1 - p)
    return ahead[0::2] - ahead[1::2], rise


def _terms(margins: Tensor, loss: str, beta: float) -> Tensor:
    """The part of the loss that is a mean over pairs, of each pair: - log(sigmoid(margin)), with ORPO times beta."""
    terms = torch.logaddexp(torch.zeros_like(margins), margins.neg())
    return terms if loss == DPO else terms.mul_(beta)


def answer_places(labels: Tensor, starts: Tensor | None) -> Tensor:
    """Which places have labels of an answer, bool [2P, S]: of all that have one those from `starts` on, int64 [2P]."""
    labelled = labels >= 0
    if starts is None:
        return labelled
    return labelled.logical_and_(torch.arange(labels.shape[1]) >= starts[:, None])


def log_probabilities(token_losses: Tensor, answered: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of each row's answer float64 [2P], its number of tokens int64 [2P])."""
    losses = torch.where(answered, token_losses.view(answered.shape), 0.0)
    return losses.double().sum(1).neg_(), answered.sum(1)


def rewards(sums: Tensor, counts: Tensor, known: Tensor, loss: str, beta: float) -> Tensor:
    """What TRL calls the rewards of answers, float64 [2P]: with DPO beta times by how much more likely an answer is than in
    the reference model, with ORPO beta times its mean log-probability.
    """
    if loss == DPO:
        return (sums - known).mul_(beta)
    return (sums / counts.clamp(min=1)).mul_(beta)


def preference_scores(
    token_losses: Tensor, labels: Tensor, known: Tensor, loss: str, beta: float, *, out: Sequence[Tensor]
) -> None:
    """What an evaluation counts up, of the arguments of `preference_loss`.

    out: float64 [2P] the log-probability of each answer; float64 [P] each: the part of the loss that is a mean over pairs, the
    difference of the rewards (of the chosen answer less that of the rejected one), the negative log-likelihood of the chosen row,
    and the number of its labels, of which ORPO's likelihood is the mean.
    """
    sums, terms, margins, unlikely, tokens = out
    answer_sums, counts = log_probabilities(token_losses, answer_places(labels, known if loss == ORPO else None))
    sums.copy_(answer_sums)
    compared, _ = _compared(answer_sums, counts, known, loss, beta)
    terms.copy_(_terms(compared, loss, beta))
    scores = rewards(answer_sums, counts, known, loss, beta)
    margins.copy_(scores[0::2] - scores[1::2])
    labelled = labels[0::2] >= 0
    unlikely.copy_(torch.where(labelled, token_losses.view(labels.shape)[0::2], 0.0).double().sum(1))
    tokens.copy_(labelled.sum(1))
