"""What the searches of one graph have found, at whatever budget, and what of it the clock had a hand in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tightfit.planner.graphs.plan_result import GraphOutcome
from tightfit.planner.graphs.problem.actions import Carried, carry
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, seconds


class Incumbents:
    """Where the searches to come start. Each has an aim, a budget or None for the smallest, and a limit in seconds.

    What comes of a search that the clock ended, or of one that started from what such a search had found, is not found
    again for sure. It is where others start all the same, but for its own aim under a larger limit: that search is made as if
    nothing had been cut, and what had been found is taken only where it is better.
    """

    def __init__(self) -> None:
        self.peaks: dict[frozenset[Rerun], int] = {}
        """schedules and their peaks in bytes"""
        self.moved: list[Carried] = []
        """schedules with moves"""
        self.timely = True
        """whether no search that any of them comes from was ended by the clock"""
        self.late: tuple[dict[frozenset[Rerun], int], list[Carried]] = {}, []
        """while one searches again: what it does not start from"""
        self._sure: tuple[dict[frozenset[Rerun], int], list[Carried]] = {}, []
        self._cut: dict[int | None, float] = {}

    def cut_before(self, aim: int | None, limit: float) -> bool:
        """Whether a search for `aim` was cut, each time under a limit below `limit`."""
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
        """The schedule whose peak is lowest."""
        return min(self.peaks, key=lambda reruns: (self.peaks[reruns], sorted(reruns)))

    def best(self, dag: Dag, budget: int) -> Carried | None:
        """The fastest schedule found that fits the budget, also of those that a search made again does not start from."""
        return _best(dag, budget, self.late[0] | self.peaks, [*self.late[1], *self.moved])

    def no_slower(self, dag: Dag, budget: int, outcome: GraphOutcome) -> GraphOutcome:
        """The outcome of a search made again: or what had been found before it, where that is faster."""
        best = _best(dag, budget, *self.late)
        if best is None or (outcome.carried is not None and outcome.carried.seconds <= best.seconds):
            return outcome
        self.timely = False
        return replace(outcome, carried=best, timely=False)

    def end(self, aim: int | None, limit: float, *, timely: bool) -> None:
        """It has ended; `timely`: with an answer that the clock had no hand in. A bound that was cut is none of this pool's."""
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
    """The fastest of schedules that fits, or no re-runs."""
    fitting = [reruns for reruns, peak in peaks.items() if peak <= budget]
    return min(fitting, key=lambda reruns: (seconds(dag, reruns), sorted(reruns)), default=frozenset())
