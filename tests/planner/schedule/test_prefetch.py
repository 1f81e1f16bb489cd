"""Transfers issued ahead of their users: in which order the reads go, and what they wait for."""

from __future__ import annotations

import pytest

from tightfit.planner.schedule.lowering import DraftInstruction, live_profile
from tightfit.planner.schedule.prefetch import clock, prefetch

MIB = 1 << 20


def entry(verb, name, *, operator=0, makes=(), seconds=0.0, transfer=0.0):
    return DraftInstruction(
        verb=verb, name=name, layer=0, operator=operator, outputs=makes, seconds=seconds, transfer=transfer
    )


def draft(*, before, small=0.01):
    """An operator that works for `before` seconds on `held` (40 MiB); then one reads a tensor of 1 MiB, and one a
    tensor of 10 MiB, at 1 s of disk for 100 MiB.
    """
    entries = (
        entry("run", "", operator=0, makes=("held",)),
        entry("run", "", operator=1, makes=("done",), seconds=before),
        entry("free", "held"),
        entry("fetch", "small", transfer=small),
        entry("run", "", operator=2, makes=("first",), seconds=0.02),
        entry("free", "small"),
        entry("fetch", "large", transfer=0.1),
        entry("run", "", operator=3, makes=("last",), seconds=0.02),
        entry("free", "large"),
    )
    inputs = {(0, 0): (), (0, 1): ("held",), (0, 2): ("small",), (0, 3): ("large",)}
    sizes = {"held": 40 * MIB, "small": MIB, "large": 10 * MIB, "done": 0, "first": 0, "last": 0}
    return entries, inputs, sizes


def fetched(entries):
    return [each.name for each in entries if each.verb == "fetch"]


@pytest.mark.parametrize(
    ("limit", "order", "stalls"),
    [
        (51 * MIB, ["small", "large"], 0.0),  # room for both beside what the operator holds
        (50 * MIB, ["large", "small"], 0.01),  # for one of them: the small one would be waited for less
        (49 * MIB, ["small", "large"], 0.08),  # for the small one alone
    ],
)
def test_where_room_is_short_the_larger_of_two_reads_goes_first(limit, order, stalls):
    entries, inputs, sizes = draft(before=1.0)
    moved = prefetch(entries, inputs, (), sizes, limit)
    assert fetched(moved) == order
    assert clock(moved, inputs).stalls == pytest.approx(stalls)
    assert max(live_profile(moved, (), sizes)) <= limit


def test_a_larger_read_does_not_go_first_where_the_smaller_would_be_late():
    """There are 0.05 s before the small tensor is needed, and the large one takes 0.1."""
    entries, inputs, sizes = draft(before=0.05)
    moved = prefetch(entries, inputs, (), sizes, 60 * MIB)
    assert fetched(moved) == ["small", "large"]
    assert clock(moved, inputs).stalls == pytest.approx(0.04)


def test_reads_of_one_size_stay_in_turn():
    entries, inputs, sizes = draft(before=1.0, small=0.1)
    moved = prefetch(entries, inputs, (), sizes | {"small": 10 * MIB}, 50 * MIB)
    assert fetched(moved) == ["small", "large"]
