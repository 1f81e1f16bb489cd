"""The losses of pairs of answers, of which one was chosen and the other rejected: DPO and ORPO, as functions of token
losses.

The answers of a batch, each behind its prompt, may lie in any of its rows, several in one: each place says which answer
its label belongs to. Answer 2n is the chosen one of pair n, answer 2n + 1 the rejected one. Both losses depend on an
answer through one number alone, its log-probability. So the gradient of a token's logits is that of its own negative
log-likelihood, times a factor that all tokens of an answer share: `preference_loss` makes these factors, and a loss
head that has folded all slices of the vocabulary needs no second pass over them
(`tightfit.runtime.engine.cpu.operators.head_weighted`).

Shapes: R rows of S places, T = R * S, which is even and more than there are answers. Sums are made in float64.

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

    token_losses float32 [T], 0 where there is no label; labels int64 [R, S], below 0 for none. `known` float64 [1 or 2,
    R, S] has for each place the number of the answer that its label belongs to, or -1, and for DPO below it the
    log-probability of that answer in the reference model. With ORPO, whose likelihood is of prompts and chosen answers,
    labels of no answer are those of the prompts of chosen ones. Pairs without a label in both answers are left out.

    out: loss float32 [], weights float32 [T].
    """
    total, weights = out
    answers = answers_of_places(labels, known)
    sums, counts, references = _answers(token_losses, answers, known)
    complete = (counts.view(-1, 2) > 0).all(1)
    pairs = complete.sum().clamp_(min=1)
    margins, rise = _compared(sums, counts, references, loss, beta)
    terms = _terms(margins, loss, beta)
    mean_loss = torch.where(complete, terms, 0.0).sum() / pairs
    # d loss / d log-probability is - sigmoid(-margin) * rise for the chosen answer and the opposite for the rejected
    # one.
    share = torch.where(complete, torch.sigmoid(margins.neg()), 0.0) / pairs
    factors = rise.view(-1, 2) * share[:, None]
    factors[:, 1].neg_()
    token_weights = torch.cat([factors.view(-1), factors.new_zeros(1)])[answers]
    if loss == ORPO:
        counted = _likely(labels, answers)
        count = counted.sum().clamp_(min=1)
        mean_loss += torch.where(counted, token_losses, 0.0).double().sum() / count
        token_weights += counted.double().div_(count)
    total.copy_(mean_loss)
    weights.copy_(token_weights)


def _compared(sums: Tensor, counts: Tensor, references: Tensor, loss: str, beta: float) -> tuple[Tensor, Tensor]:
    """(by what the chosen answers are ahead, as logits float64 [T / 2]; the absolute derivative of the loss of a pair
    by the log-probability of each answer over sigmoid of minus these logits, float64 [T]).
    """
    if loss == DPO:
        ahead, rise = rewards(sums, counts, references, loss, beta), torch.full_like(sums, beta)
    else:
        mean = (sums / counts.clamp(min=1)).clamp_(max=NEAREST)
        rest = torch.expm1(mean).neg_()  # 1 - p
        ahead, rise = mean - rest.log(), beta / (rest * counts.clamp(min=1))  # log of the odds p / (1 - p)
    return ahead[0::2] - ahead[1::2], rise


def _terms(margins: Tensor, loss: str, beta: float) -> Tensor:
    """The part of the loss that is a mean over pairs, of each pair: - log(sigmoid(margin)), with ORPO times beta."""
    terms = torch.logaddexp(torch.zeros_like(margins), margins.neg())
    return terms if loss == DPO else terms.mul_(beta)


def answers_of_places(labels: Tensor, known: Tensor) -> Tensor:
    """The number of the answer that each place has a label of, int64 [T]; T for none."""
    answers = known[0].long().view(-1)
    return torch.where((labels.view(-1) >= 0) & (answers >= 0), answers, answers.numel())


def _answers(token_losses: Tensor, answers: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the number of each answer its log-probability, float64 [T], the number of its tokens, int64 [T], and its
    log-probability in the reference model, float64 [T]; all 0 where there is none.
    """
    places = answers.numel()
    sums = torch.zeros(places + 1, dtype=torch.float64).index_add_(0, answers, token_losses.double())
    counts = torch.zeros(places + 1, dtype=torch.int64).index_add_(0, answers, torch.ones_like(answers))
    references = torch.zeros(places + 1, dtype=torch.float64)
    references[answers] = known[-1].view(-1)
    return sums[:-1].neg_(), counts[:-1], references[:-1]


def _likely(labels: Tensor, answers: Tensor) -> Tensor:
    """Which places count in ORPO's likelihood, bool [T]: those with a label, but for the rejected answers'."""
    return (labels.view(-1) >= 0) & (answers % 2 == 0)


def rewards(sums: Tensor, counts: Tensor, references: Tensor, loss: str, beta: float) -> Tensor:
    """What TRL calls the rewards of answers, float64 [T]: with DPO beta times by how much more likely an answer is than
    in the reference model, with ORPO beta times its mean log-probability.
    """
    if loss == DPO:
        return (sums - references).mul_(beta)
    return (sums / counts.clamp(min=1)).mul_(beta)


def preference_scores(
    token_losses: Tensor, labels: Tensor, known: Tensor, loss: str, beta: float, *, out: Sequence[Tensor]
) -> None:
    """What an evaluation counts up, of the arguments of `preference_loss`.

    out: float64 [T] the log-probability of each answer; float64 [T / 2] each: the part of the loss that is a mean over
    pairs, and the difference of the rewards (of the chosen answer less that of the rejected one); float64 [] each: the
    negative log-likelihood of the labels of which ORPO's likelihood is the mean, and their number.
    """
    sums, terms, margins, unlikely, tokens = out
    answers = answers_of_places(labels, known)
    answer_sums, counts, references = _answers(token_losses, answers, known)
    sums.copy_(answer_sums)
    compared, _ = _compared(answer_sums, counts, references, loss, beta)
    terms.copy_(_terms(compared, loss, beta))
    scores = rewards(answer_sums, counts, references, loss, beta)
    margins.copy_(scores[0::2] - scores[1::2])
    counted = _likely(labels, answers)
    unlikely.copy_(torch.where(counted, token_losses, 0.0).double().sum())
    tokens.copy_(counted.sum())
