"""Local search for graphs of any size: greedy eviction until the schedule fits the budget, then ruin and recreate.

Eviction frees the output that relieves most bytes per second of re-runs where memory exceeds the budget. Ruin takes
some re-runs back and evicts again; faster schedules are kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.live_bytes import Bytes, LiveBytes
from tightfit.planner.graphs.problem.schedule import Rerun, peak_bytes
from tightfit.planner.graphs.problem.work import EDITED

DEPTH = 64
"""re-runs that one eviction may cause, at most"""
EVICTIONS = 20
"""evictions per operator of the graph after which a repair gives up"""
ROUNDS = 1000
"""rounds of ruin and recreate"""


class EvictionSearch:
    """Schedules of one graph within one budget. A search that has no `work` left, or that `cutoff` ends, leaves what it
    has found.
    """

    def __init__(self, dag: Dag, budget: int, cutoff: Cutoff = NEVER) -> None:
        self.dag = dag
        self.budget = budget
        self.cutoff = cutoff
        self.work = float("inf")
        """units that are left"""
        self.random = random.Random(0)
        self.noise = 0.0

    def _ended(self, memory: LiveBytes) -> bool:
        """Whether no work is left to look at `memory` once more, or no time."""
        self.work -= EDITED * len(memory.keys)
        return self.work < 0.0 or self.cutoff.over

    # --- eviction --------------------------------------------------------------------------------------------------

    def repair(self, memory: LiveBytes, limit: float = float("inf")) -> bool:
        """Evict until `memory` fits the budget; False where that fails, costs `limit` seconds of re-runs, or is
        ended.
        """
        for _ in range(EVICTIONS * len(self.dag)):
            held = memory.bytes
            at = int(np.argmax(held))
            if held[at] <= self.budget:
                return True
            if memory.seconds >= limit or self._ended(memory):
                return False
            chosen = self._cheapest(memory, at)
            if chosen is None:
                return False
            for rerun in chosen:
                memory.add(*rerun)
        return False

    def _cheapest(self, memory: LiveBytes, at: int) -> list[Rerun] | None:
        """The eviction that relieves position `at` at the fewest seconds per byte of excess it removes, as its re-runs;
        None: none does.

        The gain is counted over all positions that exceed the budget.
        """
        key = memory.keys[at]
        over = np.maximum(memory.bytes - self.budget, 0)
        seconds = self.dag.again_seconds
        best: list[Rerun] | None = None
        best_score = float("inf")
        # Candidates in the order of an optimistic score, as if evicting one relieved every position that exceeds the
        # budget: the loop ends once that score is no better than the best found.
        places, most = int(np.count_nonzero(over)), float(over.sum())
        candidates = sorted(
            (seconds[operator] / min(size * places, most), operator, touched, reader)
            for operator, touched, reader in memory.idle(key)
            if (size := self.dag.bytes[operator]) and self.dag.recomputable[operator]
        )
        for at_best, operator, touched, reader in candidates:
            if at_best >= best_score:
                break
            size = self.dag.bytes[operator]
            start = memory.position(touched) + 1
            for stage in self._stages(memory, operator, key, reader):
                end = memory.position(stage * memory.count + operator)
                gain = float(np.minimum(over[start:end], size).sum())
                if gain <= 0.0 or seconds[operator] / gain >= best_score:
                    continue
                reruns: list[Rerun] = []
                harm = self._bring(memory, stage, operator, over, reruns, gain, best_score)
                if harm is None:
                    continue
                score = sum(seconds[i] for _, i in reruns) / (gain - harm)
                if self.noise:
                    score *= self.random.lognormvariate(0.0, self.noise)
                if score < best_score:
                    best, best_score = reruns, score
        return None if best is None else sorted(best)

    def _stages(self, memory: LiveBytes, operator: int, key: int, reader: int) -> list[int]:
        """Stages in which the operator may run again between `key` and its next reader: the latest possible, and, where
        an input has been freed by then, the last one in which all inputs still live.
        """
        count = memory.count
        late = count - 1 if reader == memory.end else reader // count
        if late * count + operator <= key or late <= operator:
            return []
        again = late * count + operator
        ends = [memory.life_end(i, memory.run_before(i, again)) for i in self.dag.again_inputs[operator]]
        last = min(ends, default=again)
        if last >= again:
            return [late]
        early = last // count if last // count * count + operator <= last else last // count - 1
        return [late, early] if early * count + operator > key else [late]

    def _bring(
        self,
        memory: LiveBytes,
        stage: int,
        operator: int,
        over: Bytes,
        reruns: list[Rerun],
        gain: float,
        dearest: float,
    ) -> float | None:
        """Append to `reruns` the re-run of `operator` in `stage` and those that it needs. Returns the bytes of excess
        over the budget that this adds, where inputs are kept longer instead of being recomputed.

        None: that is at least the `gain`, or the re-runs cost at least `dearest` seconds per byte of what is left of
        it, or there are more than `DEPTH`.
        """
        dag = self.dag
        harm, cost = 0.0, 0.0
        waiting = [operator]
        planned = {operator}
        while waiting:
            i = waiting.pop()
            reruns.append((stage, i))
            cost += dag.again_seconds[i]
            if len(reruns) > DEPTH or cost >= dearest * (gain - harm):
                return None
            key = stage * memory.count + i
            for source in dag.again_inputs[i]:
                if source in planned or (stage, source) in memory.reruns:
                    continue
                end = memory.life_end(source, memory.run_before(source, key))
                if end >= key:
                    continue
                size = dag.bytes[source]
                start, stop = memory.position(end) + 1, memory.position(key)
                stretch = memory.bytes[start:stop]
                if not dag.recomputable[source] or not size or int(np.max(stretch, initial=0)) + size <= self.budget:
                    harm += float(np.minimum(over[start:stop], size).sum())
                    if harm >= gain:
                        return None
                    continue
                planned.add(source)
                waiting.append(source)
        return harm

    # --- re-runs that are not needed after all ---------------------------------------------------------------------

    def prune(self, memory: LiveBytes, candidates: Iterable[Rerun]) -> None:
        """Take back each re-run, the most expensive first, without which `memory` still fits."""
        seconds = self.dag.again_seconds
        for rerun in sorted(candidates, key=lambda rerun: (-seconds[rerun[1]], rerun)):
            if rerun not in memory.reruns:
                continue
            if self._ended(memory):
                return
            memory.remove(*rerun)
            if int(np.max(memory.bytes)) > self.budget:
                memory.add(*rerun)

    # --- schedules that fit ----------------------------------------------------------------------------------------

    def fastest(self, seeds: Iterable[Iterable[Rerun]], work: float = float("inf")) -> frozenset[Rerun] | None:
        """The fastest schedule within the budget that eviction makes of one of the `seeds` in `work` units; None: of
        none. Seeds that fit as they are count in any case; of the others the most promising should come first.
        """
        self.work = work
        best: LiveBytes | None = None
        fits = {seed: peak_bytes(self.dag, seed) <= self.budget for seed in map(frozenset, seeds)}
        for seed in sorted(fits, key=lambda seed: not fits[seed]):
            if not fits[seed] and (self.work < 0.0 or self.cutoff.over):
                break
            memory = LiveBytes(self.dag, seed)
            if self.repair(memory):
                self.prune(memory, set(memory.reruns))
                if best is None or memory.seconds < best.seconds:
                    best = memory
        return None if best is None else frozenset(best.reruns)

    def improved(self, reruns: frozenset[Rerun], work: float = float("inf")) -> frozenset[Rerun]:
        """The best schedule found by ruin and recreate in `work` units, which starts from `reruns`; they must fit."""
        self.work = work
        memory = LiveBytes(self.dag, reruns)
        best, best_seconds = reruns, memory.seconds
        current, current_seconds = best, best_seconds
        start = 0.02 * max(best_seconds, 1e-12)
        for number in range(ROUNDS):
            if not memory.reruns or self._ended(memory):
                break
            heat = start * (1.0 - number / ROUNDS) ** 2
            self.noise = self.random.choice((0.0, 0.1, 0.3))
            for rerun in self._ruin(memory):
                memory.remove(*rerun)
            kept = set(memory.reruns)
            fits = self.repair(memory, current_seconds + heat)
            if fits:
                self.prune(memory, memory.reruns - kept if self.random.random() < 0.7 else set(memory.reruns))
            if fits and memory.seconds <= current_seconds - heat * np.log(max(self.random.random(), 1e-12)) * 0.3:
                current, current_seconds = frozenset(memory.reruns), memory.seconds
                if current_seconds < best_seconds * (1 - 1e-12):
                    best, best_seconds = current, current_seconds
            else:
                memory.change(current)
        self.noise = 0.0
        return best

    def _ruin(self, memory: LiveBytes) -> list[Rerun]:
        """Re-runs to take back: neighbours in time, or a random sample, with equal chance."""
        everything = sorted(memory.reruns)
        count = min(len(everything), 1 + int(self.random.expovariate(1 / 6)))
        if self.random.random() < 0.5:
            return sorted(self.random.sample(everything, count), reverse=True)
        at = self.random.randrange(len(everything))
        start = max(0, min(at - count // 2, len(everything) - count))
        return everything[start : start + count][::-1]
