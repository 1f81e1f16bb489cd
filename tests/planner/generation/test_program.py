"""Plans for answers: the program against all choices there are, the clock by hand, and the smallest budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from answering import BESIDE, figures
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CONFIGS

from tightfit.planner.generation.answer_plan import plan_answers
from tightfit.planner.generation.choice import Choice, ChoiceProblem, choice_problem, least_room, spread
from tightfit.planner.generation.problem import Figures, Problem, RowPiece
from tightfit.planner.generation.program import choose
from tightfit.planner.generation.simulate import simulate
from tightfit.profiles.steps.answer_tracing import answer_steps
from tightfit.profiles.weights.describe import describe
from tightfit.runtime.common.errors import InfeasibleError
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.generation.job import DEPTH, PACKED, STATES, STREAMED, UNPACKED
from tightfit.runtime.engine.generation.names import dot_key
from tightfit.runtime.engine.weights.layout import Entry


def matrices(sizes: Sequence[tuple[int, int]], head: tuple[int, int]) -> list[RowPiece]:
    """Pieces of these rows and columns, the last one of the head."""
    made = []
    for number, (rows, columns) in enumerate([*sizes, head]):
        name = f"model.layers.{number}.w.weight" if number < len(sizes) else "lm_head.weight"
        entry = Entry(name=name, shape=(rows, columns), format="q4", group=32)
        size = -(-entry.bytes // 4096) * 4096
        made.append(
            RowPiece(matrix=name, start=0, stop=rows, entry=entry, packed_bytes=size, in_head=number == len(sizes))
        )
    return made


def held(pieces: Sequence[RowPiece], states: Sequence[str]) -> int:
    """Bytes of a choice of states."""
    room = max((piece.packed_bytes for piece, state in zip(pieces, states) if state == STREAMED), default=0)
    return sum(piece.bytes(state) for piece, state in zip(pieces, states, strict=True)) + DEPTH * room


def counted(
    pieces: Sequence[RowPiece], states: Sequence[str], told: Figures, passes: Sequence[int], tokens: int
) -> float:
    """Seconds of an answer as the program counts them."""

    def time(which: Sequence[tuple[RowPiece, str]], size: int, others: float) -> float:
        work = others + sum(piece.seconds(told, state, size) for piece, state in which)
        read = sum(piece.packed_bytes for piece, state in which if state == STREAMED) * told.read_seconds_per_byte
        return max(work, read)

    both = list(zip(pieces, states, strict=True))
    body = [(piece, state) for piece, state in both if not piece.in_head]
    groups = sum(-(-count // GROUP) for count in passes)
    return (
        groups * told.group_seconds
        + len(passes) * time(body, max(passes), 0.0)
        + tokens * time(both, 1, told.token_seconds)
    )


@settings(max_examples=25)
@given(
    sizes=st.lists(st.sampled_from([(64, 64), (96, 64), (64, 256), (512, 64)]), min_size=1, max_size=5),
    share=st.floats(0.0, 1.0),
    read=st.sampled_from([1e-10, 1e-9, 1e-8]),
    unpacked=st.sampled_from([0.2, 0.9, 1.5]),
    passes=st.sampled_from([[1], [GROUP, 7], [GROUP * 4]]),
    tokens=st.sampled_from([1, 20]),
)
def test_no_choice_of_states_is_better(
    sizes: list[tuple[int, int]], share: float, read: float, unpacked: float, passes: list[int], tokens: int
) -> None:
    pieces = matrices(sizes, (320, 64))
    told = figures(pieces, unpacked=unpacked, read=read)
    most = held(pieces, [UNPACKED] * len(pieces))
    room = round(share * most)
    fitting = [
        counted(pieces, states, told, passes, tokens)
        for states in itertools.product(STATES, repeat=len(pieces))
        if held(pieces, states) <= room
    ]
    found = choose(choice_problem(pieces, told, room, passes, tokens))
    assert (found is None) == (not fitting) == (room < least_room(pieces))
    if found is None:
        return
    assert found.seconds == pytest.approx(min(fitting), rel=1e-5)
    states = spread(pieces, found)
    assert held(pieces, states) <= room
    assert counted(pieces, states, told, passes, tokens) == pytest.approx(found.seconds, rel=1e-5)


def test_pieces_of_a_kind_are_spread_evenly() -> None:
    pieces = matrices([(64, 64)] * 9, (320, 64))
    choice = Choice(counts=[{STREAMED: 3, UNPACKED: 2, PACKED: 4}, {STREAMED: 0, UNPACKED: 0, PACKED: 1}], seconds=0.0)
    states = spread(pieces, choice)
    assert Counter(states) == {STREAMED: 3, UNPACKED: 2, PACKED: 5}
    assert [place for place, state in enumerate(states) if state == STREAMED] == [2, 5, 8]


def test_a_head_of_a_format_of_its_own_is_never_unpacked() -> None:
    """One row at a time is multiplied with it packed, as compiled C does: what unpacking it would take was not
    measured.
    """
    pieces = matrices([(64, 64)] * 2, (320, 64))
    head = dataclasses.replace(pieces[-1], entry=dataclasses.replace(pieces[-1].entry, format="q8"))
    told = figures(pieces[:-1])
    told = dataclasses.replace(told, rates={**told.rates, dot_key("q8", 32, 64): 1e-9})
    found = choose(choice_problem([*pieces[:-1], head], told, 1 << 30, [GROUP], 3))
    assert found is not None
    assert found.counts[-1] == {PACKED: 1, UNPACKED: 0, STREAMED: 0}


def test_a_choice_that_is_made_elsewhere_is_the_same_plan() -> None:
    """All that passes is JSON: of the problem, and of its choice."""
    asked, told = problem(), figures(problem().pieces())
    budget = BESIDE + (40 << 20)

    def elsewhere(problems: Sequence[ChoiceProblem]) -> list[Choice | None]:
        sent = [ChoiceProblem.model_validate_json(each.model_dump_json()) for each in problems]
        made = [choose(each) for each in sent]
        return [each and Choice.model_validate_json(each.model_dump_json()) for each in made]

    assert plan_answers(asked, told, budget, elsewhere) == plan_answers(asked, told, budget)


def problem(**more: Any) -> Problem:
    config = CONFIGS["llama"]
    sizes = {"prompt_tokens": 70, "answer_tokens": 10} | more
    return Problem(steps=answer_steps(config, describe(config), 0), entries=describe(config), **sizes)


def test_the_memory_of_the_next_longer_context_counts() -> None:
    told = dataclasses.replace(figures([]), base_bytes={"1024": 30, "0": 10, "256": 20})
    assert [told.base(context) for context in (1, 256, 257, 1024, 5000)] == [20, 20, 30, 30, 30]


def test_the_clock_by_hand() -> None:
    """Every piece is streamed, and reading takes longer than all else: after two rooms are full, each read begins when
    its room is free, which is when the piece before the one before is done.
    """
    asked = problem(prompt_tokens=5, answer_tokens=2)
    pieces = asked.pieces()
    told = figures(pieces, read=1e-6, core=0.0)
    found = simulate(asked, told, pieces, [STREAMED] * len(pieces), 5)
    reading = [piece.packed_bytes * 1e-6 for piece in pieces]
    assert found.token_seconds == pytest.approx(sum(reading), rel=0.05)
    assert found.read_bytes == sum(piece.packed_bytes for piece in pieces)
    idle = simulate(asked, told, pieces, [PACKED] * len(pieces), 5)
    each = 2e-9 * sum(piece.elements for piece in pieces)
    assert idle.token_seconds == pytest.approx(each + told.token_seconds + told.key_seconds * 6)
    assert idle.weight_seconds == pytest.approx(each)
    assert idle.stall_seconds == 0
    assert found.stall_seconds == pytest.approx(found.token_seconds - idle.token_seconds, rel=0.05)


@pytest.mark.slow
def test_every_budget_is_kept_and_more_memory_is_never_slower() -> None:
    asked = problem()
    told = figures(asked.pieces(), read=1e-8)
    with pytest.raises(InfeasibleError, match="is too small: what a pass needs") as caught:
        plan_answers(asked, told, BESIDE)
    least = caught.value.minimum_budget_bytes
    assert least is not None
    with pytest.raises(InfeasibleError):
        plan_answers(asked, told, least - 1)
    times = []
    for budget in range(least, least + (2 << 20), 128 << 10):
        plan = plan_answers(asked, told, budget)
        assert plan.peak_bytes <= budget
        taken: list[tuple[int, int]] = [
            (piece.at, piece.at + rows.bytes(piece.state))
            for piece, rows in zip(plan.pieces, asked.pieces(), strict=True)
            if piece.at >= 0
        ]
        taken.append((plan.staging[0], plan.staging[0] + DEPTH * plan.staging[1]))
        taken += [(at, at + 4 * _elements(shape)) for at, shape, _ in plan.places.values()]
        taken.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
        assert taken[-1][1] <= plan.arena_bytes
        times.append(plan.times.first_seconds + 9 * plan.times.token_seconds)
    assert all(later <= sooner * 1.02 for sooner, later in itertools.pairwise(times))
    assert times[-1] < 0.9 * times[0]


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
