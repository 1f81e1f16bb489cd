"""The smallest budget from below: which questions are asked, and when the answer is proven."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tightfit.planner.solve.minimum_budget import ROUNDS, lower_peak


@dataclass
class Peak:
    peak_bytes: int


class Oracle:
    """Schedules exist from `least` bytes on; `spare`: how much lower than asked they come out."""

    def __init__(self, least, spare=0):
        self.least, self.spare, self.asked = least, spare, []

    def __call__(self, best, step):
        goal = best.peak_bytes - step
        self.asked.append(goal)
        return Peak(max(self.least, goal - self.spare)) if goal >= self.least else None


@pytest.mark.parametrize("step", [1, 1000, 10**6])
@pytest.mark.parametrize("least", [10**6 - 1, 10**6 - 2, 999_000, 654_321, 500_001, 500_000])
def test_one_byte_less_has_none(least, step):
    oracle = Oracle(least)
    best, ended = lower_peak(Peak(10**6), oracle, 500_000, step)
    assert (best.peak_bytes, ended) == (least, True)
    assert least == 500_000 or oracle.asked[-1] == least - 1
    assert min(oracle.asked) >= 500_000


def test_nothing_is_asked_at_the_floor():
    oracle = Oracle(0)
    assert lower_peak(Peak(500), oracle, 500) == (Peak(500), True)
    assert not oracle.asked


def test_an_end_without_proof():
    """Each schedule comes out a byte lower than the last: there is always another question."""
    seen = []

    def creeping(best, step):
        seen.append(step)
        return Peak(best.peak_bytes - 1) if step <= 2 else None

    best, ended = lower_peak(Peak(10**9), creeping, 0)
    assert not ended
    assert len(seen) == ROUNDS
    assert best.peak_bytes < 10**9


def test_time_is_up():
    def below(best, step):
        if best.peak_bytes < 900:
            raise TimeoutError
        return Peak(best.peak_bytes - step)

    best, ended = lower_peak(Peak(1000), below, 0, 60)
    assert not ended
    assert best.peak_bytes < 900
