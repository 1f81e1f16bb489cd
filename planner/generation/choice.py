"""What the choice of what stays in memory is made from: pieces of a decoder's matrices by what they cost. It holds
sizes and seconds alone, so that it can be solved elsewhere, and needs no solver to be made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from tightfit.planner.generation.problem import Figures, RowPiece
from tightfit.profiles.schema import FrozenRecord
from tightfit.runtime.common.units import LARGEST
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.generation.job import DEPTH, PACKED, STREAMED, UNPACKED

MOST_KINDS = 1 << 10
"""kinds of pieces in one choice: of published decoders it has a dozen"""
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Seconds = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]


@dataclass(frozen=True)
class PieceKind:
    """Pieces that cost the same in every state; `head` tells those that a prompt's passes before the last do not
    need.
    """

    format: str
    group: int
    columns: int
    rows: int
    packed_bytes: int
    head: bool


def kind_of(piece: RowPiece) -> PieceKind:
    entry = piece.entry
    return PieceKind(
        entry.format, entry.group, entry.columns, piece.stop - piece.start, piece.packed_bytes, piece.in_head
    )


class StateCosts(FrozenRecord):
    """A piece in one of its states: the bytes that stay in memory, and seconds of the cores."""

    allowed: bool
    held_bytes: Number
    token_seconds: Seconds
    """in a pass of one token"""
    group_seconds: Seconds
    """in the longest pass of a prompt; 0 for the head, which its last pass alone needs"""


class PieceCosts(FrozenRecord):
    """So many pieces of a kind."""

    number: Annotated[int, Field(ge=1, le=LARGEST)]
    head: bool
    packed_bytes: Number
    packed: StateCosts
    unpacked: StateCosts
    streamed: StateCosts

    def costs(self, state: str) -> StateCosts:
        return {PACKED: self.packed, UNPACKED: self.unpacked, STREAMED: self.streamed}[state]


class ChoiceProblem(FrozenRecord):
    """The states in which the passes of a prompt and those of single tokens take least, within a room for matrices."""

    kinds: Annotated[list[PieceCosts], Field(min_length=1, max_length=MOST_KINDS)]
    room_bytes: Number
    prompt_passes: Annotated[int, Field(ge=1, le=LARGEST)]
    groups: Number
    """of all passes of the prompt"""
    token_passes: Number
    token_seconds: Seconds
    """of a pass of one token, beside its matrices"""
    group_seconds: Seconds
    read_seconds_per_byte: Seconds


class Choice(FrozenRecord):
    """How many pieces of each kind are in each state, with the seconds that the program counts for the whole answer."""

    counts: list[dict[str, int]]
    """by kind, in the order of the problem"""
    seconds: float


Choose = Callable[[Sequence[ChoiceProblem]], Sequence[Choice | None]]
"""makes the best choices; None for a problem in whose room nothing fits"""


def choice_problem(
    pieces: Sequence[RowPiece],
    figures: Figures,
    room: int,
    passes: Sequence[int],
    tokens: int,
    *,
    key_seconds: float = 0.0,
) -> ChoiceProblem:
    """The choice for passes of a prompt, of so many tokens each, and `tokens` passes of one token, with at most `room`
    bytes for matrices.

    `key_seconds` is what the cache adds to the pass of a token.
    """
    examples = {kind_of(piece): piece for piece in pieces}
    numbers = Counter(map(kind_of, pieces))
    longest = max(passes)

    def costs(piece: RowPiece, state: str) -> StateCosts:
        if state not in piece.states(figures):  # what it would take was not measured
            return StateCosts(allowed=False, held_bytes=0, token_seconds=0.0, group_seconds=0.0)
        return StateCosts(
            allowed=True,
            held_bytes=piece.bytes(state),
            token_seconds=piece.seconds(figures, state, 1),
            group_seconds=0.0
            if piece.in_head
            else piece.seconds(figures, state, longest),  # the head sees a single row
        )

    return ChoiceProblem(
        kinds=[
            PieceCosts(
                number=number,
                head=kind.head,
                packed_bytes=examples[kind].packed_bytes,
                packed=costs(examples[kind], PACKED),
                unpacked=costs(examples[kind], UNPACKED),
                streamed=costs(examples[kind], STREAMED),
            )
            for kind, number in numbers.items()
        ],
        room_bytes=room,
        prompt_passes=len(passes),
        groups=sum(-(-count // GROUP) for count in passes),
        token_passes=tokens,
        token_seconds=figures.token_seconds + key_seconds,
        group_seconds=figures.group_seconds,
        read_seconds_per_byte=figures.read_seconds_per_byte,
    )


def least_room(pieces: Sequence[RowPiece]) -> int:
    """The fewest bytes in which matrices can be kept and read: those of the largest pieces stay, if that is less than
    the rooms to read them.
    """
    sizes = Counter(piece.packed_bytes for piece in pieces)
    kept, least = 0, []
    for size in sorted(sizes, reverse=True):
        least.append(kept + DEPTH * size)
        kept += size * sizes[size]
    return min(*least, kept)


def spread(pieces: Sequence[RowPiece], choice: Choice) -> list[str]:
    """A state for each piece: those of one kind are spread evenly over the pass, so that reading goes on all the
    time.
    """
    seen: Counter[PieceKind] = Counter()
    states = []
    numbers = Counter(map(kind_of, pieces))
    counts_of = dict(zip(numbers, choice.counts, strict=True))
    for piece in pieces:
        kind = kind_of(piece)
        at, number, counts = seen[kind], numbers[kind], counts_of[kind]
        seen[kind] += 1
        streamed, unpacked = counts[STREAMED], counts[UNPACKED]
        if _takes(at, streamed, number):
            states.append(STREAMED)
        else:
            rest = at - at * streamed // number
            states.append(UNPACKED if _takes(rest, unpacked, number - streamed) else PACKED)
    return states


def _takes(at: int, part: int, whole: int) -> bool:
    """Whether number `at` of `whole` is one of `part` that are spread evenly."""
    return (at + 1) * part // whole > at * part // whole
