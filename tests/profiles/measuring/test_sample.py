"""Of a program in tiles three tiles are run to measure it; what the operators of the others take follows from
theirs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tiny_plans import decoder_profile

from tightfit.profiles.measuring import worker
from tightfit.profiles.measuring.guard import OutputGuard
from tightfit.profiles.measuring.messages import Steps
from tightfit.profiles.measuring.sample import sample, work
from tightfit.profiles.measuring.worker import ScratchStores, measure_program, settle_operators
from tightfit.runtime.engine.start import kernel_warmup
from tightfit.runtime.engine.training.job import BEGINS_AT, TILES_AT

TILES = 6
Program = dict[str, Any]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Program]:
    """The programs of a decoder, for a text in six tiles."""
    profile = decoder_profile(tmp_path_factory.mktemp("tiles"), batch=1, seq=8 * TILES, tile=8)
    return [each.model_dump() for each in profile.programs]


@pytest.fixture(scope="module")
def layer(programs: list[Program]) -> Program:
    return max(programs, key=lambda each: len(attention(each)))


def attention(program: Program) -> dict[tuple[str, int], int]:
    """(target, tiles that it attends to) of the operators of tiles -> their numbers."""
    return {
        (operator["target"], len(operator["args"][TILES_AT[operator["target"]]])): number
        for number, operator in enumerate(program["operators"])
        if operator["target"] in TILES_AT
    }


def inferred_tiles(program: Program, target: str) -> list[int]:
    """Of the operators of this target that are not run, the tiles that they attend to."""
    between = sample(program).between
    return sorted(tiles for (name, tiles), number in attention(program).items() if name == target and number in between)


@pytest.mark.slow
def test_of_attention_the_shortest_two_and_the_longest_are_run(layer: Program) -> None:
    forward, backward = TILES_AT
    assert inferred_tiles(layer, forward) == [3, 4, 5]
    # The backward of the last tile has no sums to add to, and stands for none of the others.
    assert inferred_tiles(layer, backward) == [3, 4]


def test_a_figure_lies_between_those_of_others_by_its_tiles(layer: Program) -> None:
    numbers, between = attention(layer), sample(layer).between
    for target in TILES_AT:
        figures = {number: 3.0 * tiles + 1.0 for (name, tiles), number in numbers.items() if name == target}
        known = {number: figure for number, figure in figures.items() if number not in between}
        for number, figure in figures.items():
            if number in between:
                assert between[number].of(known) == pytest.approx(figure)


def test_with_a_sliding_window_all_attention_is_run(layer: Program) -> None:
    windowed = copy.deepcopy(layer)
    for number in attention(windowed).values():
        windowed["operators"][number]["args"][-1] = 8
    assert sample(layer).between
    assert not sample(windowed).between


def test_three_tiles_are_run_and_stand_for_the_others(programs: list[Program]) -> None:
    for program in programs:
        values = {value["name"]: value for value in program["values"]}
        chosen = sample(program)
        works = [work(operator, values) for operator in program["operators"]]
        for number, other in chosen.equal.items():
            assert works[number] == works[other]
            assert chosen.stand_in(other) is None
            assert other < number
        if program.get("tiles") == TILES:
            run = [works[number] for number in range(len(works)) if chosen.stand_in(number) is None]
            assert set(run) >= {key for key in works if works.count(key) % TILES == 0}
            for key in set(run):
                if works.count(key) % TILES == 0:
                    assert run.count(key) == works.count(key) // TILES * 3
                else:
                    assert run.count(key) == works.count(key) or key in {works[number] for number in chosen.between}


@pytest.mark.slow
def test_a_program_that_is_not_in_tiles_is_run_whole(tmp_path: Path) -> None:
    for program in decoder_profile(tmp_path, batch=2, seq=16).programs:
        chosen = sample(program.model_dump())
        assert not chosen.equal
        assert not chosen.between


def test_where_a_part_begins_makes_no_difference_and_its_size_does(programs: list[Program]) -> None:
    head = next(program for program in programs if any(op["target"] in BEGINS_AT for op in program["operators"]))
    values = {value["name"]: value for value in head["values"]}
    chunk = next(operator for operator in head["operators"] if operator["target"] in BEGINS_AT)
    elsewhere, smaller = copy.deepcopy(chunk), copy.deepcopy(chunk)
    elsewhere["args"][BEGINS_AT[chunk["target"]]] += 64
    elsewhere["args"][0]["operand"]["offset"] += 8
    smaller["args"][0]["operand"]["size"][0] -= 1
    assert work(elsewhere, values) == work(chunk, values)
    assert work(smaller, values) != work(chunk, values)


@pytest.mark.slow
def test_what_others_stand_for_is_not_run(
    programs: list[Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[int, Any] = {}
    run = worker._run

    def counted(operator: Any, *given: Any) -> None:
        ran[id(operator)] = operator
        run(operator, *given)

    monkeypatch.setattr(worker, "_run", counted)
    scratch, guard = ScratchStores(tmp_path), OutputGuard()
    for program in copy.deepcopy(programs):
        contents = settle_operators(program, guard, scratch)
        ran.clear()
        everything, chosen = range(len(program["operators"])), sample(program)
        seconds, workspaces = measure_program(program, scratch, contents, seconds=0.0, workspaces_of=everything)
        run_themselves = {number for number in everything if chosen.stand_in(number) is None}
        assert set(seconds) == set(workspaces) == run_themselves
        assert len(ran) == len(run_themselves)


def test_every_operator_has_a_figure(programs: list[Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the operator that stands for it, or one between those of two."""

    class Unknown:
        def known(self, *_: Any) -> None: ...

        def note(self, *_: Any) -> None: ...

    def measured(_: Program, *__: Any, workspaces_of: Any, timed: Any, **___: Any) -> Any:
        return {number: 1e-3 * (1 + number) for number in timed}, {number: 2 * number for number in workspaces_of}

    monkeypatch.setattr(worker, "measure_program", measured)
    monkeypatch.setattr(kernel_warmup, "settle", lambda: None)
    contents = {program["name"]: "normal" for program in programs}
    request = {"programs": programs, "turning_bytes": None}
    steps = Steps(4 * len(programs))
    figures = worker.measure_operators(request, ScratchStores(tmp_path), contents, steps, Unknown())  # type: ignore[arg-type]
    inferred = 0
    for program in programs:
        chosen, rows = sample(program), figures[program["name"]]
        assert len(rows) == len(program["operators"])
        for number, other in chosen.equal.items():
            assert rows[number] == rows[other]
        for number, ends in chosen.between.items():
            inferred += 1
            assert rows[number][0] == pytest.approx(ends.of({n: rows[n][0] for n in (ends.shorter, ends.longer)}))
            assert rows[number][1] == max(rows[ends.shorter][1], rows[ends.longer][1])
    assert inferred
