"""Bytes that are live at every run of a schedule, updated incrementally as re-runs are added and removed.

A run is named by its key, stage × (number of operators) + operator: sorted keys are the order of the runs. Adding or
removing a re-run changes a few lifetimes, each a range of the array; nothing is recounted from the start.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun

Bytes = npt.NDArray[np.int64]


class LiveBytes:
    """A schedule of `dag` that a search edits."""

    def __init__(self, dag: Dag, reruns: Iterable[Rerun] = ()) -> None:
        self.dag = dag
        self.count = len(dag)
        self.reruns: set[Rerun] = set()
        self.seconds = 0.0
        """seconds of all re-runs; first runs are not counted"""
        first = [i * self.count + i for i in range(self.count)]
        self.keys = first
        self.end = self.count * self.count
        """a key after all others"""
        self.runs: list[list[int]] = [[key] for key in first]
        self.uses: list[list[int]] = [[user * self.count + user for user in dag.users[i]] for i in range(self.count)]
        self._bytes: Bytes = np.zeros(2 * self.count, dtype=np.int64)
        """live bytes and workspace at each run in the first len(keys) entries; the others are spare capacity"""
        for i in range(self.count):
            last = self.count - 1 if dag.keep[i] else max([i, *dag.users[i]])
            self._bytes[i : last + 1] += dag.bytes[i]
        self._bytes[: self.count] += np.array(dag.workspace, dtype=np.int64) + dag.fixed_bytes
        for stage, operator in sorted(reruns):
            self.add(stage, operator)

    @property
    def bytes(self) -> Bytes:
        """Bytes during each run, in order."""
        return self._bytes[: len(self.keys)]

    def position(self, key: int) -> int:
        return bisect_left(self.keys, key)

    def run_before(self, operator: int, key: int) -> int:
        """Index in `runs[operator]` of the last run before `key`."""
        return bisect_left(self.runs[operator], key) - 1

    def life_end(self, operator: int, index: int) -> int:
        """Key of the run that last reads the output of run `index` of `operator`: the run's own key where nothing reads
        it, `end` where it is the last run and the output must be there at the end.
        """
        made = self.runs[operator]
        last = index + 1 == len(made)
        if last and self.dag.keep[operator]:
            return self.end
        used = self.uses[operator]
        at = len(used) if last else bisect_left(used, made[index + 1])
        return max(used[at - 1], made[index]) if at else made[index]

    def add(self, stage: int, operator: int) -> None:
        """Run `operator` again in `stage`."""
        dag = self.dag
        key = stage * self.count + operator
        at = self.position(key)
        following = self.keys[at] % self.count
        length = len(self.keys)
        if length == len(self._bytes):
            self._bytes = np.concatenate([self._bytes, np.zeros(length, dtype=np.int64)])
        b = self._bytes
        b[at + 1 : length + 1] = b[at:length].copy()
        # The new run starts from the following run's bytes less that run's own output and workspace: what lives across
        # the gap.
        first = self.keys[at] == following * (self.count + 1)
        after = (dag.workspace if first else dag.again_workspace)[following]
        b[at] += dag.again_workspace[operator] - after - dag.bytes[following]
        self.keys.insert(at, key)
        size = dag.bytes[operator]
        index = self.run_before(operator, key)
        if self.life_end(operator, index) > key:
            b[self.position(self._used_before(operator, index, key)) + 1 : at] -= size
        else:
            b[at] += size
        self.runs[operator].insert(index + 1, key)
        for i in dag.again_inputs[operator]:
            end = self.life_end(i, self.run_before(i, key))
            if end < key:
                b[self.position(end) + 1 : at + 1] += dag.bytes[i]
            insort(self.uses[i], key)
        self.reruns.add((stage, operator))
        self.seconds += dag.again_seconds[operator]

    def remove(self, stage: int, operator: int) -> None:
        """Take back the re-run of `operator` in `stage`; the output of the run before it then lives until the readers
        of this one.
        """
        dag = self.dag
        key = stage * self.count + operator
        at = self.position(key)
        b = self._bytes
        for i in dag.again_inputs[operator]:
            used = self.uses[i]
            del used[bisect_left(used, key)]
            end = self.life_end(i, self.run_before(i, key))
            if end < key:
                b[self.position(end) + 1 : at + 1] -= dag.bytes[i]
        made = self.runs[operator]
        index = bisect_left(made, key)
        lives_on = self.life_end(operator, index) > key
        del made[index]
        if lives_on:
            b[self.position(self._used_before(operator, index - 1, key)) + 1 : at] += dag.bytes[operator]
        del self.keys[at]
        length = len(self.keys)
        b[at:length] = b[at + 1 : length + 1].copy()
        self.reruns.discard((stage, operator))
        self.seconds -= dag.again_seconds[operator]

    def _used_before(self, operator: int, index: int, key: int) -> int:
        """Key of the last run before `key` that reads the output of run `index`, or of that run
        itself where none does.
        """
        used = self.uses[operator]
        at = bisect_left(used, key)
        return max(used[at - 1], self.runs[operator][index]) if at else self.runs[operator][index]

    def change(self, wanted: Iterable[Rerun]) -> None:
        """Add and remove re-runs until they are exactly those `wanted`."""
        goal = set(wanted)
        for rerun in sorted(self.reruns - goal, reverse=True):
            self.remove(*rerun)
        for rerun in sorted(goal - self.reruns):
            self.add(*rerun)

    def idle(self, key: int) -> list[tuple[int, int, int]]:
        """Outputs that live at the run `key` without being read or made by it: (operator, last touched, next read).

        The last two are keys. `end` is the next read of an output that nothing reads any more but that must be there at
        the end.
        """
        result = []
        running = key % self.count
        first = key == running * (self.count + 1)
        busy = {running, *(self.dag.inputs if first else self.dag.again_inputs)[running]}
        for operator in range(key // self.count):
            used = self.uses[operator]
            after = bisect_right(used, key)
            if operator in busy or (after == len(used) and not self.dag.keep[operator]):
                continue
            made = self.runs[operator]
            index = bisect_left(made, key) - 1
            reader = used[after] if after < len(used) else self.end
            if index + 1 < len(made) and made[index + 1] < reader:
                continue
            result.append((operator, max(made[index], used[after - 1] if after else -1), reader))
        return result
