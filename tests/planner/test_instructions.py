"""Instructions and their arrays in plan files: the same there and back, and refusals that say what is wrong."""

from __future__ import annotations

import pytest

from tightfit.planner.instructions import (
    TYPES,
    Accumulate,
    Fetch,
    Free,
    Pass,
    Perturb,
    Read,
    Run,
    Spill,
    Unpack,
    Update,
    from_json,
    read_all,
    write_all,
)

EACH = {
    Read("w", 4096): ["read", "w", 4096],
    Unpack("w", 64): ["unpack", "w", 64],
    Run("layer", 3, (0, None)): ["run", "layer", 3, [0, None]],
    Free("a"): ["free", "a"],
    Spill("a"): ["spill", "a"],
    Fetch("a", 128): ["fetch", "a", 128],
    Update("p"): ["update", "p"],
    Perturb("p", -2): ["perturb", "p", -2],
    Pass("grad:a", "grad:b"): ["pass", "grad:a", "grad:b"],
    Accumulate("p", 192): ["accumulate", "p", 192],
}
"""with the arrays that plan files of this version hold"""


def test_each_instruction_is_the_same_there_and_back():
    assert {type(one) for one in EACH} == set(TYPES)
    assert write_all(EACH) == list(EACH.values())
    assert read_all(EACH.values()) == list(EACH)
    assert read_all([*EACH, *EACH.values()]) == [*EACH, *EACH]


def test_instructions_of_the_same_tensor_differ():
    assert len({Free("a"), Spill("a"), Update("a")}) == 3


@pytest.mark.parametrize(
    "array",
    [
        [],
        [1],
        ["leap", 1],
        [["run"], "layer", 0, []],
        ["free"],
        ["free", 1],
        ["free", "a", "b"],
        ["read", "w"],
        ["read", "w", "0"],
        ["read", "w", 0.0],
        ["read", "w", True],
        ["fetch", "a", None],
        ["perturb", "p", 1.0],
        ["run", "layer", "0", []],
        ["run", "layer", 0, 5],
        ["run", "layer", 0, [0.5]],
        ["run", "layer", 0],
        ["pass", "a", None],
    ],
)
def test_what_is_no_instruction_is_refused_with_its_words(array):
    with pytest.raises(ValueError, match="instruction") as caught:
        from_json(array)
    assert str(array) in str(caught.value)
