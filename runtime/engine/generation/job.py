"""The job of a process that generates: which weights it holds, reads and unpacks, where its tensors lie, and its
cap.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any, Self

PACKED, UNPACKED, STREAMED = "packed", "unpacked", "streamed"
"""What becomes of a piece of a matrix: it stays in memory as it lies in the store; it stays unpacked, in float32; it is
read from disk, packed, each time that it is needed."""
STATES = (PACKED, UNPACKED, STREAMED)
DEPTH = 2
"""pieces for which there is room while they are read: one is worked on and the next arrives"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: with a `temperature` of 0 the most likely one (greedy), otherwise at random, as
    transformers does.
    """

    temperature: float = 0.0
    top_k: int = 0
    """draw from so many of the likeliest tokens only; 0: from all"""
    top_p: float = 1.0
    """draw from the fewest of the likeliest tokens whose probabilities add up to at least this (nucleus sampling)"""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a layer's attention sees."""

    heads: int
    kv_heads: int
    width: int
    """of a head"""
    window: int | None
    """tokens, its own included, that a token attends to; None: all"""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of a matrix, of which each is read and unpacked as a whole."""

    matrix: str
    """name of the matrix in the store"""
    start: int
    stop: int
    """rows"""
    state: str
    at: int = -1
    """byte offset in the arena; -1 for what is streamed"""

    @property
    def name(self) -> str:
        """What the store calls it."""
        return f"{self.matrix}[{self.start}:{self.stop}]"


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """All sizes are in bytes, offsets are of the arena."""

    store: str
    """path of the packed store"""
    device: str
    vocab: int
    head: str
    """name of the matrix that makes logits"""
    seen: tuple[Seen, ...]
    """what each layer's attention sees"""
    context: int
    """most tokens of a prompt and its answer together"""
    pass_tokens: int
    """most tokens of a prompt that go through the layers at a time"""
    block_elements: int
    """of a matrix that are unpacked at a time"""
    pieces: tuple[Piece, ...]
    """of all matrices, in the order in which a pass needs them; those of the head are last"""
    places: dict[str, tuple[int, tuple[int, ...], str]]
    """offset, shape and dtype of every other tensor, by name: those of the store and of the adapter under their names
    there
    """
    staging: tuple[int, int]
    """offset, and bytes of the room of one streamed piece, of which there are `DEPTH`"""
    arena_bytes: int
    cap_bytes: int
    """that this process may hold"""
    budget_bytes: int
    """of all processes"""
    steps: list[dict[str, Any]]
    """of one token, and of a group: `tightfit.planner.generation.decoder_form.DecoderForm.job`"""
    numbers: dict[str, list[float]]
    """constants that the steps read and the store does not hold, float32, by name"""
    bias: str | None = None
    """name of the logits' bias"""
    cap: float | None = None
    """soft cap of the logits"""
    adapter: str | None = None
    """path of the adapter's tensors"""
    adapter_body: str = "model."
    scales: dict[str, float]
    """scale of the adapter's pair, by the matrix that it is added to"""
    measure: bool = False
    """whether to measure what a plan needs to know, instead of answering"""
    sampled: bool = False
    """whether tokens are drawn then, which takes memory and code of its own"""

    def write(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    @classmethod
    def read(cls, path: str) -> Self:
        with open(path, encoding="utf-8") as file:
            read = json.load(file)
        os.unlink(path)
        read["pieces"] = tuple(Piece(**piece) for piece in read["pieces"])
        read["places"] = {name: (at, tuple(shape), dtype) for name, (at, shape, dtype) in read["places"].items()}
        read["seen"] = tuple(Seen(**seen) for seen in read["seen"])
        read["staging"] = tuple(read["staging"])
        return cls(**read)
