"""Tensors of a program that are measured share bytes only where they are never needed at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.profiles.measuring.placement import ALIGNMENT, WEIGHT_BUFFERS, Placement, aligned, first_fit, place

KIB = 1 << 10


@st.composite
def programs(draw: Any) -> dict[str, Any]:
    """Programs whose operators read what they are given and what earlier ones made, and may write over either."""
    count = draw(st.integers(1, 8))
    values = [
        value(
            f"w{index}",
            draw(st.sampled_from([64, 100, 4 * KIB])),
            "weight",
            draw(st.sampled_from(["bfloat16", "float32"])),
        )
        for index in range(draw(st.integers(0, 6)))
    ]
    values += [value(f"x{index}", draw(st.integers(1, 300)), "activation") for index in range(draw(st.integers(1, 3)))]
    operators = []
    for position in range(count):
        names = [one["name"] for one in values]
        inputs = draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
        outputs: list[str | None] = []
        for index in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from(["new", "new", "new", "none", "again"]))
            if kind == "new":
                values.append(value(f"y{position}.{index}", draw(st.integers(0, 5000)), "activation"))
                outputs.append(values[-1]["name"])
            elif kind == "none":
                outputs.append(None)
            else:
                outputs.append(draw(st.sampled_from(names)))
        gathers = [name for name in inputs if name.startswith("w")][:1] if draw(st.booleans()) else []
        operators.append({"inputs": inputs, "outputs": outputs, "gathers": gathers})
    return {"values": values, "operators": operators}


def value(name: str, size: int, kind: str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "bytes": 4 * size, "shape": [size], "stride": [1], "dtype": dtype, "kind": kind}


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(programs(), st.sampled_from([None, 0, 5 * KIB, 1 << 20]))
def test_what_an_operator_reads_is_what_was_made_or_given(program, weight_bytes):
    """Each byte of a simulated arena says which tensor it was last written for. Two rounds are run, as when operators
    are timed.
    """
    placement = place(program, weight_bytes)
    sizes = {one["name"]: one["bytes"] for one in program["values"]}
    weights = {one["name"] for one in program["values"] if one["kind"] == "weight"}
    arena: list[str | None] = [None] * placement.bytes

    def write(name: str) -> None:
        begin = placement.offsets[name]
        arena[begin : begin + sizes[name]] = [name] * sizes[name]

    for name in placement.kept:
        write(name)
    for pool in placement.pools:
        arena[pool.offset : pool.offset + pool.bytes] = ["pool " + pool.dtype] * pool.bytes
    written_weights = {name for operator in program["operators"] for name in operator["outputs"] if name in weights}
    for _ in range(2):
        for operator in program["operators"]:
            for name in operator["inputs"]:
                begin = placement.offsets.get(name)
                if name in operator["gathers"]:
                    continue
                assert begin is not None
                assert begin % ALIGNMENT == 0
                found = set(arena[begin : begin + sizes[name]])
                if name not in weights:
                    assert found <= {name}
                elif not written_weights:
                    assert found <= {f"pool {next(v['dtype'] for v in program['values'] if v['name'] == name)}"}
            read = [name for name in operator["inputs"] if name not in operator["gathers"]]
            for output in filter(None, operator["outputs"]):
                for name in read:
                    assert name == output or name in weights or not overlap(placement, sizes, name, output)
                write(output)


def overlap(placement: Placement, sizes: dict[str, int], one: str, other: str) -> bool:
    first, second = placement.offsets[one], placement.offsets[other]
    return first < second + sizes[other] and second < first + sizes[one]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12), st.integers(0, 12)), max_size=12))
def test_first_fit_keeps_apart_what_lives_at_once_and_no_lower_place_is_free(items):
    tensors = {str(index): (size, min(a, b), max(a, b)) for index, (size, a, b) in enumerate(items)}
    offsets = first_fit(tensors)
    taken = {
        name: {(byte, time) for byte in range(offsets[name], offsets[name] + size) for time in range(first, last + 1)}
        for name, (size, first, last) in tensors.items()
    }
    assert sum(map(len, taken.values())) == len(set().union(*taken.values()))
    for name, (size, first, last) in tensors.items():
        larger = [
            n
            for n, other in tensors.items()
            if (-other[0], other[1], list(tensors).index(n)) < (-size, first, list(tensors).index(name))
        ]
        before = set().union(*(taken[n] for n in larger))
        for lower in range(offsets[name]):
            assert {
                (byte, time) for byte in range(lower, lower + size) for time in range(first, last + 1)
            } & before or not size


def test_tensors_that_follow_one_another_share_their_bytes():
    names = ["x", "a", "b", "c", "d"]
    program = {
        "values": [value(name, KIB, "activation") for name in names],
        "operators": [
            {"inputs": [before], "outputs": [after], "gathers": []} for before, after in itertools.pairwise(names)
        ],
    }
    placement = place(program)
    assert placement.kept == ("x",)
    assert placement.bytes == 3 * 4 * KIB  # what is given, and two of what is made
    assert placement.offsets["a"] == placement.offsets["c"]


@pytest.mark.parametrize(
    ("weight_bytes", "weights"), [(None, WEIGHT_BUFFERS), (3 * 4 * KIB, 3), (0, 1), (1 << 30, WEIGHT_BUFFERS)]
)
def test_weights_take_turns_in_what_they_are_given(weight_bytes, weights):
    names = [f"w{index}" for index in range(9)]
    program = {
        "values": [value(name, KIB, "weight") for name in names],
        "operators": [{"inputs": names, "outputs": [], "gathers": []}],
    }
    placement = place(program, weight_bytes)
    assert placement.bytes == weights * aligned(4 * KIB)
    assert [placement.offsets[name] for name in names] == [4 * KIB * (index % weights) for index in range(9)]


def test_what_has_bytes_between_its_elements_keeps_its_place():
    """Nothing writes the bytes between, and a window on them would find what another tensor left."""
    gaps = {**value("gaps", 4, "activation"), "shape": [2, 2], "stride": [8, 1], "bytes": 40}
    program = {
        "values": [value("x", 4, "activation"), gaps, value("y", 4, "activation")],
        "operators": [
            {"inputs": ["x"], "outputs": ["gaps"], "gathers": []},
            {"inputs": ["x"], "outputs": ["y"], "gathers": []},
        ],
    }
    placement = place(program)
    assert set(placement.kept) == {"x", "gaps"}
    assert not overlap(placement, {"gaps": 40, "y": 16}, "gaps", "y")
