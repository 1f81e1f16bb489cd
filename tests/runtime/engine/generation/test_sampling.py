"""The choice of tokens against transformers' own processors of logits."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tightfit.runtime.engine.generation.job import Sampling
from tightfit.runtime.engine.generation.sampling import Sampler


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.001])
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2)) * 3
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    due = torch.softmax(LogitsProcessorList(steps)(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())[0], 0)
    found = Sampler(Sampling(temperature=temperature, top_k=top_k, top_p=top_p)).probabilities(logits.clone())
    torch.testing.assert_close(found, due)


def test_a_seed_says_what_is_drawn_and_answers_of_one_seed_differ() -> None:
    logits = torch.zeros(1000)

    def drawn(seed: int, number: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), number)
        return [sampler.choose(logits.clone()) for _ in range(20)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(*one)) for one in ((1, 0), (1, 1), (2, 0))}) == 3


def test_drawn_tokens_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(temperature=1.0, top_k=3))
    counts = torch.bincount(torch.tensor([sampler.choose(logits.clone()) for _ in range(4000)]), minlength=4)
    due = torch.softmax(torch.tensor([2.0, 1.0, 0.0, -torch.inf]), 0)
    torch.testing.assert_close(counts / 4000, due, rtol=0.0, atol=0.03)


def test_without_a_temperature_the_likeliest_is_taken() -> None:
    assert Sampler(Sampling(top_p=1.0)).choose(torch.tensor([0.0, 3.0, 2.0])) == 1
