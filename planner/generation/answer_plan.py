"""Plans for answers at a budget: the passes of a prompt, the state of every piece of a matrix, and where each tensor
lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.planner.generation.choice import Choice, ChoiceProblem, Choose, choice_problem, least_room, spread
from tightfit.planner.generation.places import Places, aligned_bytes
from tightfit.planner.generation.problem import Figures, Problem, RowPiece, in_pages
from tightfit.planner.generation.simulate import Simulated, simulate
from tightfit.runtime.common.errors import InfeasibleError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.generation.job import DEPTH, STREAMED, Piece


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """Bytes and seconds; peaks are predicted."""

    budget_bytes: int
    peak_bytes: int
    """of all processes together"""
    front_bytes: int
    """of the process that shows the answers"""
    arena_bytes: int
    cache_bytes: int
    """of keys and values"""
    pass_tokens: int
    context: int
    pieces: tuple[Piece, ...]
    places: dict[str, tuple[int, tuple[int, ...], str]]
    staging: tuple[int, int]
    times: Simulated
    busy_cores: float = 0.0
    """cores that other programs took while the figures were measured"""

    def summary(self) -> dict[str, Any]:
        """What is said of the plan, in the form of JSON."""
        states = Counter(piece.state for piece in self.pieces)
        return {
            "budget_bytes": self.budget_bytes,
            "peak_bytes": self.peak_bytes,
            "cache_bytes": self.cache_bytes,
            "context": self.context,
            "pass_tokens": self.pass_tokens,
            "pieces": dict(sorted(states.items())),
            "first_seconds": self.times.first_seconds,
            "token_seconds": self.times.token_seconds,
            "weight_seconds": self.times.weight_seconds,
            "stall_seconds": self.times.stall_seconds,
            "read_bytes_per_token": self.times.read_bytes,
            "busy_cores": self.busy_cores,
        }


def plan_answers(problem: Problem, figures: Figures, budget: int, choose: Choose | None = None) -> GenerationPlan:
    """The plan that answers fastest within `budget` bytes of all processes together. `choose` solves what has to be
    chosen; by default it is solved here.

    Raises InfeasibleError, with the smallest budget that fits, where none does.
    """
    pieces = problem.pieces()
    front = problem.front_bytes(figures)
    beside = front + figures.base(problem.context) + problem.heap_bytes()
    start = front + figures.start_bytes
    sizes = _pass_sizes(problem.asked)
    least = max(start, beside + in_pages(problem.other_bytes(sizes[0])) + least_room(pieces))
    if budget < least:
        what = (
            "Python and PyTorch while they start"
            if least == start
            else "what a pass needs, the cache and the processes"
        )
        raise InfeasibleError(
            f"the budget of {format_size(budget)} is too small: {what} take {format_size(least)}; give"
            f" {spelled('memory')} {-(-least // MIB)}MiB or more, or fewer tokens ({spelled('max_tokens')},"
            f" {spelled('context')})",
            least,
        )
    keys = figures.key_seconds * (problem.prompt_tokens + problem.answer_tokens / 2)
    fitting = []
    for size in sizes:
        room = budget - beside - in_pages(problem.other_bytes(size))
        if room < least_room(pieces):
            break
        passes = problem.passes(size)
        fitting.append((size, choice_problem(pieces, figures, room, passes, problem.answer_tokens, key_seconds=keys)))
    choices = (choose or _choose_here)([wanted for _, wanted in fitting])
    best: tuple[float, int, list[str]] | None = None
    for (size, _), choice in zip(fitting, choices, strict=True):
        if choice is not None and (best is None or choice.seconds < best[0]):
            best = choice.seconds, size, spread(pieces, choice)
    assert best is not None
    _, size, states = best
    return laid_out(problem, figures, pieces, states, size, budget=budget)


def _choose_here(problems: Sequence[ChoiceProblem]) -> Sequence[Choice | None]:
    from tightfit.planner.generation.program import choose_each

    return choose_each(problems)


def plan_measuring(problem: Problem) -> GenerationPlan:
    """The plan with which figures are measured: every matrix is streamed, and one group of tokens passes at a time."""
    pieces = problem.pieces()
    states = [STREAMED] * len(pieces)
    nothing = Simulated(first_seconds=0.0, token_seconds=0.0, stall_seconds=0.0, weight_seconds=0.0, read_bytes=0)
    return laid_out(problem, None, pieces, states, GROUP, budget=1 << 62, times=nothing)


def _pass_sizes(prompt: int) -> list[int]:
    """Tokens that a pass may take: multiples of `GROUP`, the last of them large enough for the whole prompt."""
    sizes, size = [], GROUP
    while size < prompt:
        sizes.append(size)
        size *= 2
    return [*sizes, prompt] if sizes else [prompt]


def laid_out(
    problem: Problem,
    figures: Figures | None,
    pieces: Sequence[RowPiece],
    states: Sequence[str],
    pass_tokens: int,
    *,
    budget: int,
    times: Simulated | None = None,
) -> GenerationPlan:
    """The plan with these states of the pieces: a place for every tensor, and the simulator's figures, or `times` where
    nothing is measured yet.
    """
    at, placed = 0, []
    for piece, state in zip(pieces, states, strict=True):
        size = piece.bytes(state)
        where = at if size else -1
        placed.append(Piece(matrix=piece.matrix, start=piece.start, stop=piece.stop, state=state, at=where))
        at += size
    room = max((piece.packed_bytes for piece, state in zip(pieces, states) if state == STREAMED), default=0)
    staging = at, room
    at += DEPTH * room
    others: Places = problem.places(pass_tokens)
    places: dict[str, tuple[int, tuple[int, ...], str]] = {}
    for name, (shape, dtype) in others.items():
        places[name] = at, shape, dtype
        at += aligned_bytes(shape, dtype)
    arena = in_pages(at)
    process = front = 0
    if figures is not None:
        times = simulate(problem, figures, pieces, states, pass_tokens)
        process = max(figures.start_bytes, figures.base(problem.context) + problem.heap_bytes() + arena)
        front = problem.front_bytes(figures)
    assert times is not None
    cache = sum(aligned_bytes(*others[name]) for name in others if name.startswith(("keys.", "values.")))
    return GenerationPlan(
        budget_bytes=budget,
        peak_bytes=process + front,
        front_bytes=front,
        arena_bytes=arena,
        cache_bytes=cache,
        pass_tokens=pass_tokens,
        context=problem.context,
        pieces=tuple(placed),
        places=places,
        staging=staging,
        times=times,
        busy_cores=0.0 if figures is None else figures.busy_cores,
    )
