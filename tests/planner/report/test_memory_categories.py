from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st
from sample_plans import infeasible_plan, sample_plan, sample_plans

from tightfit.planner.report.memory_categories import (
    KINDS,
    budgets_of,
    fullest,
    in_use,
    kinds_of,
    peak_parts,
    policies_of,
    timeline_slices,
)
from tightfit.planner.schema import TimelinePoint
from tightfit.runtime.common.units import MIB

lengths = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1 << 40)), min_size=1, max_size=60)


def timeline_of(parts):
    ends = itertools.accumulate(length for length, _ in parts)
    return [
        TimelinePoint(instruction=i, seconds=end, bytes=size, by_kind={"activation": size})
        for i, (end, (_, size)) in enumerate(zip(ends, parts, strict=True))
    ]


@given(lengths, st.integers(1, 40))
def test_buckets_keep_the_peak_and_cover_the_step(parts, count):
    timeline = timeline_of(parts)
    shown = timeline_slices(timeline, count)
    assert 1 <= len(shown) <= count
    assert max(bucket.point.bytes for bucket in shown) == max(point.bytes for point in timeline)
    assert shown[0].start == 0.0
    assert math.isclose(shown[-1].end, timeline[-1].seconds, rel_tol=1e-9)
    for left, right in itertools.pairwise(shown):
        assert math.isclose(left.end, right.start, rel_tol=1e-9)


@given(lengths, st.integers(1, 40))
def test_a_bucket_shows_no_more_than_happens_in_it(parts, count):
    timeline = timeline_of(parts)
    begins = [0.0, *(point.seconds for point in timeline)]
    slack = timeline[-1].seconds * 1e-6 + 1e-12
    for bucket in timeline_slices(timeline, count):
        point = bucket.point
        assert begins[point.instruction] <= bucket.end + slack
        assert point.seconds >= bucket.start - slack


def test_buckets_of_nothing():
    assert timeline_slices([], 10) == []


def test_equal_neighbours_are_merged():
    timeline = timeline_of([(0.1, 7)] * 50)
    assert len(timeline_slices(timeline, 25)) == 1


def test_kinds_are_stacked_in_order_and_unknown_ones_come_last():
    point = TimelinePoint(
        instruction=0, seconds=1, bytes=6, by_kind={"zeppelin": 1, "gradient": 2, "floor": 3, "weight": 0}
    )
    assert [kind.name for kind in kinds_of([point])] == ["floor", "gradient", "zeppelin"]


def test_a_card_has_no_python_in_it():
    point = TimelinePoint(instruction=0, seconds=1, bytes=3, by_kind={"floor": 2, "weight": 1})
    labels = {on: [kind.label for kind in kinds_of([point], on)] for on in ("cpu", "cuda")}
    assert labels == {"cpu": ["Python and PyTorch", "weights, unpacked"], "cuda": ["CUDA context", "weights, unpacked"]}


def test_every_part_of_a_peak_has_a_colour():
    parts = [kind for kind, size in peak_parts(sample_plan()) if size]
    assert "at other moments" in [kind.label for kind in parts]
    assert {kind.name for kind in parts} <= {kind.name for kind in KINDS}
    assert all(kind.name.isalpha() for kind in KINDS)  # pages name their colours by them


def test_kind_names_and_colours_are_distinct():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert len({kind.light for kind in KINDS}) == len(KINDS)
    assert len({kind.dark for kind in KINDS}) == len(KINDS)


def test_fullest_is_the_first_highest_point():
    timeline = timeline_of([(0.1, 5), (0.1, 9), (0.1, 9)])
    assert fullest(timeline) == timeline[1]
    assert fullest([]) is None


def test_pages_that_nothing_lives_in_do_not_make_a_peak():
    full = TimelinePoint(instruction=0, seconds=1, bytes=10, by_kind={"activation": 10})
    later = TimelinePoint(instruction=1, seconds=2, bytes=12, by_kind={"activation": 3, "fragmentation": 9})
    assert in_use(later) == 3
    assert fullest([later, full]) == full
    assert timeline_slices([full, later], 1)[0].point == full


def test_the_solver_comes_first_and_budgets_ascend():
    plans = [infeasible_plan("mebp", 400 * MIB), sample_plan("solver", 300 * MIB), *sample_plans()]
    assert policies_of(plans)[0] == "solver"
    assert set(policies_of(plans)) == {"solver", "mebp", "keep-all"}
    assert budgets_of(plans) == [size * MIB for size in (250, 300, 350, 400, 500, 800)]
