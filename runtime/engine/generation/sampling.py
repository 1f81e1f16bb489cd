"""Chooses the next token from the logits: the most likely one, or one drawn at random from the likeliest."""

from __future__ import annotations

import torch
from torch import Tensor

from tightfit.runtime.engine.generation.job import Sampling


class Sampler:
    """Draws the tokens of one answer. `number` tells the answers of one seed apart."""

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        self._generator.manual_seed((sampling.seed * 1_000_003 + number) % (1 << 63))

    def choose(self, logits: Tensor) -> int:
        """The next token, from float32 logits [V], which are overwritten."""
        if not self.sampling.temperature:
            return int(torch.argmax(logits))
        return int(torch.multinomial(self.probabilities(logits), 1, generator=self._generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probability of every token, float32 [V]; `logits` are overwritten.

        Sources: Fan et al. 2018, "Hierarchical Neural Story Generation" (top-k); Holtzman et al. 2020, "The Curious
        Case of Neural Text Degeneration" (top-p).
        """
        logits.div_(self.sampling.temperature)
        top_k, top_p = self.sampling.top_k, self.sampling.top_p
        if 0 < top_k < logits.numel():
            least = torch.topk(logits, top_k).values[-1]
            logits.masked_fill_(logits < least, float("-inf"))
        if top_p < 1.0:
            ordered, places = torch.sort(logits)
            out = torch.softmax(ordered, 0).cumsum_(0) <= 1.0 - top_p
            out[-1] = False
            logits[places[out]] = float("-inf")
        return torch.softmax(logits, 0)
