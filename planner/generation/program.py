"""The integer program that chooses what stays in memory, (50) to (55) of docs/formulation.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tightfit.planner.generation.problem import PAGE, Figures, RowPiece
from tightfit.planner.solvers.lp import Linear, LinearProgram
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.generation.job import DEPTH, PACKED, STATES, STREAMED, UNPACKED

GAP = 1e-6
MILLISECONDS = 1e3


@dataclass(frozen=True)
class PieceKind:
    """Pieces that cost the same in every state; `head` tells those that a prompt's passes before the last do not need."""

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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How many pieces of each kind are in each state, with the seconds that the program counts for the whole answer."""

    counts: Mapping[PieceKind, Mapping[str, int]]
    seconds: float


def choose(
    pieces: Sequence[RowPiece],
    figures: Figures,
    room: int,
    passes: Sequence[int],
    tokens: int,
    *,
    key_seconds: float = 0.0,
) -> Choice | None:
    """The states in which passes of a prompt, of so many tokens each, and `tokens` passes of one token take least, with at
    most `room` bytes for matrices; None if none fits.

    `key_seconds` is what the cache adds to the pass of a token.
    """
    examples = {kind_of(piece): piece for piece in pieces}
    numbers = Counter(map(kind_of, pieces))
    program = LinearProgram()
    counts = {
        kind: {
            state: program.variable(0, number if state in examples[kind].states(figures) else 0, whole=True)
            for state in STATES
        }
        for kind, number in numbers.items()
    }
    staging = program.variable(0)  # pages of the room of one streamed piece
    held = Linear(0.0).add(staging, float(DEPTH))
    token, group = Linear(MILLISECONDS * (figures.token_seconds + key_seconds)), Linear(0.0)
    read_all, read_body = Linear(), Linear()
    fixed = MILLISECONDS * figures.group_seconds
    longest = max(passes)
    for kind, number in numbers.items():
        piece, own = examples[kind], counts[kind]
        program.exactly(Linear.sum(own.values()), float(number))  # (50)
        some = program.choice()
        program.at_least(Linear().add(some, float(number)), Linear().add(own[STREAMED]))  # (51)
        pages = piece.packed_bytes / PAGE
        program.at_least(Linear().add(staging), Linear().add(some, pages))
        for state in (PACKED, UNPACKED):
            held.add(own[state], piece.bytes(state) / PAGE)
        reading = MILLISECONDS * piece.packed_bytes * figures.read_seconds_per_byte
        read_all.add(own[STREAMED], reading)
        if not kind.head:
            read_body.add(own[STREAMED], reading)
        for state in STATES:
            token.add(own[state], MILLISECONDS * piece.seconds(figures, state, 1))
            if not kind.head:
                group.add(own[state], MILLISECONDS * piece.seconds(figures, state, longest))
    program.at_least(Linear(room / PAGE), held)  # (52)
    token_time, pass_time = program.variable(0), program.variable(0)
    for time, work, read in ((token_time, token, read_all), (pass_time, group, read_body)):
        program.at_least(Linear().add(time), work)  # (53)
        program.at_least(Linear().add(time), read)  # (54)
    groups = sum(-(-count // GROUP) for count in passes)
    goal = Linear(fixed * groups).add(token_time, float(tokens)).add(pass_time, float(len(passes)))  # (55)
    found = program.solve(goal, gap=GAP)
    if found.values is None:
        return None
    values = found.values
    chosen = {kind: {state: round(values[number]) for state, number in own.items()} for kind, own in counts.items()}
    return Choice(counts=chosen, seconds=found.objective / MILLISECONDS)


def least_room(pieces: Sequence[RowPiece]) -> int:
    """The fewest bytes in which matrices can be kept and read: those of the largest pieces stay, if that is less than the
    rooms to read them.
    """
    sizes = Counter(piece.packed_bytes for piece in pieces)
    kept, least = 0, []
    for size in sorted(sizes, reverse=True):
        least.append(kept + DEPTH * size)
        kept += size * sizes[size]
    return min(*least, kept)


def spread(pieces: Sequence[RowPiece], choice: Choice) -> list[str]:
    """A state for each piece: those of one kind are spread evenly over the pass, so that reading goes on all the time."""
    seen: Counter[PieceKind] = Counter()
    states = []
    numbers = Counter(map(kind_of, pieces))
    for piece in pieces:
        kind = kind_of(piece)
        at, number, counts = seen[kind], numbers[kind], choice.counts[kind]
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
