"""What a plan for answers decides on: a decoder's matrices in pieces, the measured figures, and what is needed in any
case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tightfit.planner.generation.decoder_form import DecoderForm
from tightfit.planner.generation.places import Places, aligned_bytes
from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP, attention_cache_scratch, cache_scratch
from tightfit.runtime.engine.generation.job import PACKED, STATES, STREAMED, UNPACKED, Sampling
from tightfit.runtime.engine.generation.names import (
    LORA_A,
    LORA_B,
    MAGNITUDE,
    PRODUCT,
    ROOM,
    dot_key,
    multiply_key,
    unpack_key,
    unpacked_key,
)
from tightfit.runtime.engine.generation.sizes import BLOCK_ELEMENTS, block_rows, cache_places
from tightfit.runtime.engine.weights.layout import Entry, find_extent

PIECE_ELEMENTS = 1 << 22
"""of a matrix at most in one piece, so that the rooms for what is read stay small: 2.3 MiB at 4 bits"""
PAGE = 4096
SLACK_BYTES = 3 << 18
"""allowance for small holes in the heap of a process that runs for long"""
TOKEN_BYTES = 192
"""of the heap for each token of a prompt or its answer, as a number in lists and in messages"""


def in_pages(size: int) -> int:
    """Bytes, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured: see `tightfit.runtime.engine.generation.measuring.measure`. Bytes and seconds."""

    start_bytes: int
    """the peak of its start, with an allowance"""
    base_bytes: Mapping[str, int]
    """by a number of keys that attention sees at most"""
    rates: Mapping[str, float]
    group_seconds: float
    token_seconds: float
    key_seconds: float
    read_seconds_per_byte: float
    read_core_seconds_per_byte: float
    """of a core, while the disk reads"""
    front_bytes: int
    """of the process that shows the answers"""
    busy_cores: float = 0.0
    """cores that other programs took meanwhile"""

    def base(self, context: int) -> int:
        """Bytes of the process that computes beside its arena, where attention sees so many keys; for more than were
        measured, those of the most: the buffers that grow with them have a largest size.
        """
        measured = sorted((int(seen), size) for seen, size in self.base_bytes.items())
        return next((size for seen, size in measured if seen >= context), measured[-1][1])


@dataclass(frozen=True, kw_only=True)
class AdapterPair:
    """The adapter's pair of a matrix."""

    rank: int
    scale: float
    dora: bool = False


@dataclass(frozen=True, kw_only=True)
class RowPiece:
    """A piece of a matrix, and what it takes in each state."""

    matrix: str
    start: int
    stop: int
    entry: Entry
    packed_bytes: int
    """of the aligned extent in the store"""
    in_head: bool = False
    """whether only the last pass of a prompt needs it"""

    @property
    def elements(self) -> int:
        return (self.stop - self.start) * self.entry.columns

    @property
    def unpacked_bytes(self) -> int:
        return in_pages(4 * self.elements)

    def bytes(self, state: str) -> int:
        """Bytes that stay in memory."""
        return {PACKED: self.packed_bytes, UNPACKED: self.unpacked_bytes, STREAMED: 0}[state]

    def states(self, figures: Figures) -> tuple[str, ...]:
        """The states that it may be in: not unpacked where one row of activations is multiplied with packed rows, since
        answers would have other bits then.
        """
        return (PACKED, STREAMED) if self._dot_key in figures.rates else STATES

    def seconds(self, figures: Figures, state: str, tokens: int) -> float:
        """Seconds of the cores in a pass of so many tokens, those that reading takes of them included."""
        reading = self.packed_bytes * figures.read_core_seconds_per_byte if state == STREAMED else 0.0
        columns, rates = self.entry.columns, figures.rates
        if tokens == 1 and state != UNPACKED and self._dot_key in rates:
            return reading + self.elements * rates[self._dot_key]
        key = unpacked_key if state == UNPACKED else multiply_key
        rows = 1 if tokens == 1 else GROUP
        each = rates[key(rows, columns)] * tokens / rows
        unpacking = 0.0 if state == UNPACKED else rates[unpack_key(self.entry.format, self.entry.group, columns)]
        return reading + self.elements * (each + unpacking)

    @property
    def _dot_key(self) -> str:
        return dot_key(self.entry.format, self.entry.group, self.entry.columns)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A decoder that is to answer prompts of up to `prompt_tokens` with up to `answer_tokens`."""

    steps: AnswerSteps
    entries: Mapping[str, Entry]
    """of the packed store"""
    prompt_tokens: int
    answer_tokens: int
    new_tokens: int | None = None
    """of a prompt, those for which a plan is to be fast: in a conversation most of a prompt is in the cache already;
    None: all
    """
    sampling: Sampling = field(default_factory=Sampling)
    pairs: Mapping[str, AdapterPair] = field(default_factory=dict)
    """the adapter, by the matrix that a pair is added to"""
    cache_dtype: str = "float32"

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    @cached_property
    def form(self) -> DecoderForm:
        return DecoderForm(self.steps, self.asked)

    def pieces(self) -> list[RowPiece]:
        """All matrices in the order in which a pass needs them, in pieces of at most `PIECE_ELEMENTS`."""
        return [piece for name in (*self.form.matrices(), self.form.head) for piece in self._divided(name)]

    def _divided(self, name: str) -> Iterator[RowPiece]:
        """Pieces of about equal size that begin where a checksum's rows begin."""
        entry = self.entries[name]
        segments = -(-entry.rows // entry.segment_rows)
        count = min(segments, -(-entry.rows * entry.columns // PIECE_ELEMENTS))
        step = -(-segments // count) * entry.segment_rows
        for start in range(0, entry.rows, step):
            stop = min(start + step, entry.rows)
            packed = find_extent(self.entries, f"{name}[{start}:{stop}]").bytes
            yield RowPiece(
                matrix=name,
                start=start,
                stop=stop,
                entry=entry,
                packed_bytes=packed,
                in_head=name == self.form.head,
            )

    # --- what is needed in any case -----------------------------------------------------------------------------------

    def places(self, pass_tokens: int) -> Places:
        """Every tensor beside the matrices, where passes take so many tokens."""
        constants = self.form.constants(self.entries)
        return {**constants, **self._adapter(), **self._cache(), **self._activations(pass_tokens)}

    def _adapter(self) -> Places:
        places: Places = {}
        for matrix, pair in self.pairs.items():
            name, (outputs, inputs) = matrix.removesuffix(".weight"), self.entries[matrix].shape
            places[name + LORA_A] = (pair.rank, inputs), "float32"
            places[name + LORA_B] = (outputs, pair.rank), "float32"
            if pair.dora:
                places[name + MAGNITUDE] = (outputs,), "float32"
        return places

    def _cache(self) -> Places:
        return {
            f"{what}.{layer}": ((seen.kv_heads, cache_places(self.context, seen.window), seen.width), self.cache_dtype)
            for layer, seen in enumerate(self.form.seen)
            for what in ("keys", "values")
        }

    def _activations(self, tokens: int) -> Places:
        group, narrow = min(GROUP, self.context), self.cache_dtype != "float32"
        scratch = [
            size
            for seen in set(self.form.seen)
            for size in (
                attention_cache_scratch(seen.heads, seen.kv_heads, seen.width, self.context, narrow=narrow),
                cache_scratch(seen.kv_heads * seen.width),
            )
        ]
        blocks = [
            (min(block_rows(piece.entry.columns, BLOCK_ELEMENTS), piece.stop - piece.start), piece.entry.columns)
            for piece in self.pieces()
        ]
        sizes: dict[str, tuple[int, ...]] = {
            "attention": (max(scratch),),
            "logits": (1, self.steps.vocab),
            ROOM: (max(rows * columns for rows, columns in blocks),),
            PRODUCT: (group * max(rows for rows, _ in blocks),),
        }
        return {**self.form.activations(tokens), **{name: (size, "float32") for name, size in sizes.items()}}

    def other_bytes(self, pass_tokens: int) -> int:
        """Bytes of the arena beside the matrices and the rooms of what is read."""
        return sum(aligned_bytes(*place) for place in self.places(pass_tokens).values())

    def passes(self, pass_tokens: int) -> list[int]:
        """Tokens of each pass of a prompt."""
        return [min(pass_tokens, self.asked - start) for start in range(0, self.asked, pass_tokens)]

    @property
    def asked(self) -> int:
        """Tokens of a prompt that go through the layers."""
        return self.prompt_tokens if self.new_tokens is None else min(self.new_tokens, self.prompt_tokens)

    def heap_bytes(self) -> int:
        """Bytes of the process that computes beside the arena and what was measured."""
        return SLACK_BYTES + TOKEN_BYTES * self.context

    def front_bytes(self, figures: Figures) -> int:
        """Bytes of the process that shows the answers."""
        return figures.front_bytes + TOKEN_BYTES * self.context
