"""The judge of plans for answers: plays passes on a clock, with the disk beside the cores, and counts the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.planner.generation.problem import Figures, Problem, RowPiece
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.generation.job import DEPTH, STREAMED


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Seconds of an answer of the longest prompt and length that the plan allows."""

    first_seconds: float
    """until the first token, where as many tokens of the prompt are new as the plan was asked to be fast for"""
    token_seconds: float
    """of each further token, on average"""
    stall_seconds: float
    """of a token's seconds, those spent waiting for the disk"""
    weight_seconds: float
    """of a token's seconds, those of the products with the weights, unpacking and what reading takes of the cores
    included
    """
    read_bytes: int
    """per token"""


class _Clock:
    """Where cores and disk are: pieces are read in order, each once a room is free."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures
        self.now = self.disk = self.stalled = 0.0
        self.released = [0.0] * DEPTH
        """when the rooms became free, the oldest first"""

    def play(self, pieces: Sequence[RowPiece], states: Sequence[str], tokens: int, others: float) -> None:
        """A pass over these pieces; `others` are the seconds of all else, spread over them."""
        each = others / len(pieces)
        for piece, state in zip(pieces, states, strict=True):
            if state == STREAMED:
                begun = max(self.disk, self.released.pop(0))
                self.disk = begun + piece.packed_bytes * self.figures.read_seconds_per_byte
                self.stalled += max(0.0, self.disk - self.now)
                self.now = max(self.now, self.disk)
            self.now += piece.seconds(self.figures, state, tokens) + each
            if state == STREAMED:
                self.released.append(self.now)


def simulate(
    problem: Problem, figures: Figures, pieces: Sequence[RowPiece], states: Sequence[str], pass_tokens: int
) -> Simulated:
    """Play the passes of the longest prompt, and of two tokens in the middle of the longest answer."""
    clock = _Clock(figures)
    body = sum(not piece.in_head for piece in pieces)  # those of the head are last
    for tokens in problem.passes(pass_tokens):
        clock.play(pieces[:body], states[:body], tokens, figures.group_seconds * -(-tokens // GROUP))
    clock.play(pieces[body:], states[body:], 1, 0.0)
    first = clock.now
    keys = problem.prompt_tokens + problem.answer_tokens / 2
    others = figures.token_seconds + figures.key_seconds * keys
    clock.play(pieces, states, 1, others)
    begun, stalled = clock.now, clock.stalled
    clock.play(pieces, states, 1, others)
    return Simulated(
        first_seconds=first,
        token_seconds=clock.now - begun,
        stall_seconds=clock.stalled - stalled,
        weight_seconds=sum(piece.seconds(figures, state, 1) for piece, state in zip(pieces, states, strict=True)),
        read_bytes=sum(piece.packed_bytes for piece, state in zip(pieces, states, strict=True) if state == STREAMED),
    )
