"""The pool of schedules that the searches of one graph have found at any budget, kept so that answers stay
reproducible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tightfit.planner.graphs.plan_result import GraphOutcome
from tightfit.planner.graphs.problem.actions import Carried, carry
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, seconds


class Incumbents:
    """The schedules that later searches start from. Each search has an aim (a budget, or None for the smallest) and a
    time limit in seconds.

    A search is cut if the time limit ended it. What it found, and what was found by searches that started from that,
    depends on the machine's speed. Later searches start from it all the same, with one exception: a search for the same
    aim under a larger limit starts from the pool as it was before any search was cut, and takes the cut search's
    schedules only where these are better.
    """

    def __init__(self) -> None:
        self.peaks: dict[frozenset[Rerun], int] = {}
        """schedules and their peaks in bytes"""
        self.moved: list[Carried] = []
        """schedules with moves to the disk"""
        self.timely = True
        """whether no time limit ended any search that the schedules come from"""
        self.late: tuple[dict[frozenset[Rerun], int], list[Carried]] = {}, []
        """during a search that is repeated under a larger limit: the schedules that it does not start from"""
        self._sure: tuple[dict[frozenset[Rerun], int], list[Carried]] = {}, []
        """the pool as it was before any search was cut"""
        self._cut: dict[int | None, float] = {}
        """aims whose search was cut -> the largest limit at which it was"""

    def cut_before(self, aim: int | None, limit: float) -> bool:
        """Whether a search for `aim` was cut before, and always under a limit below `limit`."""
        return limit > self._cut.get(aim, limit)

    def begin(self, aim: int | None, limit: float) -> None:
        """A search for `aim` starts; `end` follows."""
        if self.cut_before(aim, limit):
            self.late = self.peaks, self.moved
            self.peaks, self.moved = dict(self._sure[0]), list(self._sure[1])
            self.timely = True
        elif not self._cut:
            self._sure = dict(self.peaks), list(self.moved)

    def lowest(self) -> frozenset[Rerun]:
        """The re-runs of the schedule with the lowest peak."""
        return min(self.peaks, key=lambda reruns: (self.peaks[reruns], sorted(reruns)))

    def best(self, dag: Dag, budget: int) -> Carried | None:
        """The fastest schedule found that fits the budget, those in `late` included; None: none does."""
        return _best(dag, budget, self.late[0] | self.peaks, [*self.late[1], *self.moved])

    def no_slower(self, dag: Dag, budget: int, outcome: GraphOutcome) -> GraphOutcome:
        """The outcome of a repeated search, or the schedule in `late` that fits the budget, where that is faster."""
        best = _best(dag, budget, *self.late)
        if best is None or (outcome.carried is not None and outcome.carried.seconds <= best.seconds):
            return outcome
        self.timely = False
        return replace(outcome, carried=best, timely=False)

    def end(self, aim: int | None, limit: float, *, timely: bool) -> None:
        """A search for `aim` has ended. `timely`: no time limit influenced its schedule. Bounds that a time limit cut
        do not count here.
        """
        if timely or self.timely:
            self._cut.pop(aim, None)
            if self.late[0] and self.timely:
                self._sure = dict(self.peaks), list(self.moved)
        else:
            self._cut[aim] = max(limit, self._cut.get(aim, limit))
        if self._cut:
            self.peaks = self.late[0] | self.peaks
            self.moved = [*self.late[1], *self.moved]
        self.timely = not self._cut
        self.late = {}, []


def _best(dag: Dag, budget: int, peaks: Mapping[frozenset[Rerun], int], moved: Iterable[Carried]) -> Carried | None:
    fitting = [carried for carried in moved if carried.peak_bytes <= budget]
    reruns = fastest(dag, budget, peaks)
    if peaks.get(reruns, budget + 1) <= budget:
        fitting.append(carry(dag, reruns))
    return min(fitting, key=lambda carried: carried.seconds, default=None)


def fastest(dag: Dag, budget: int, peaks: Mapping[frozenset[Rerun], int]) -> frozenset[Rerun]:
    """The fastest of the schedules that fit the budget; the empty set (keep-all), which need not
    fit, where none does.
    """
    fitting = [reruns for reruns, peak in peaks.items() if peak <= budget]
    return min(fitting, key=lambda reruns: (seconds(dag, reruns), sorted(reruns)), default=frozenset())
