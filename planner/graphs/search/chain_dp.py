"""Optimal checkpoints of a chain by dynamic programming.

In a chain each forward operator reads the one before it, and the backward reads the forward's outputs from last to
first. With output a held, ``best[a][c]`` is the least time of forward re-runs for the backward operators that read
outputs a to c - 1, as a function of memory: also hold an output b in between, run the backward operators that read b to
c - 1, then those that read a to b - 1. For equal operators this is the optimum (Griewank and Walther 2000, Algorithm
799); for unequal ones it is the best schedule that holds a checkpoint from when it is stored until its last use
(Beaumont et al. 2019, Rotor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np
import numpy.typing as npt

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, pruned

MOST_UNITS = 512
"""the budget is divided into at most so many units of memory; sizes are rounded up to whole units"""
LONGEST = 160
"""forward operators of a chain at most; the work grows with their third power"""


def as_chain(dag: Dag) -> tuple[int, ...] | None:
    """Per backward operator the forward output that it reads, or else that the last one before it to read any did;
    these never rise. None where the graph is no chain or has more than `LONGEST` forward operators.
    """
    forward = dag.forward
    if not 2 <= forward <= min(LONGEST, len(dag) - 1) or any(dag.keep[:-1]) or not all(dag.recomputable[1:forward]):
        return None
    if any(dag.inputs[i] != ((i - 1,) if i else ()) for i in range(forward)):
        return None
    reads = []
    turn = forward - 1
    for q in range(forward, len(dag)):
        own = [i for i in dag.inputs[q] if i < forward]
        if len(own) > 1 or (own and own[0] > turn) or {*dag.inputs[q]} - {*own, q - 1}:
            return None
        turn = own[0] if own else turn
        reads.append(turn)
    return tuple(reads)


def checkpoints(dag: Dag, reads: Sequence[int], budget_bytes: int, cutoff: Cutoff = NEVER) -> frozenset[Rerun] | None:
    """The re-runs of the best checkpoints within the budget, None where no choice of checkpoints fits. `reads`: see
    `as_chain`.

    Raises TimeoutError where `cutoff` strikes.
    """
    room = budget_bytes - dag.fixed_bytes
    if dag.inputs[0] or not dag.recomputable[0]:
        sequence = _Program(dag, reads, room, cutoff).sequence()
    else:
        # Output 0 need not be held: the program sees one more operator before it, of no bytes and no time, as the one
        # that is.
        before = _Program(_after_nothing(dag), [turn + 1 for turn in reads], room, cutoff)
        held = before.sequence()
        sequence = None if held is None else [operator - 1 for operator in held[1:]]
    return None if sequence is None else _reruns(dag, sequence)


def _after_nothing(dag: Dag) -> Dag:
    """The chain with an operator of no bytes and no time before its first. Only the fields that `_Program` reads are
    right.
    """
    return replace(
        dag,
        seconds=(0.0, *dag.seconds),
        bytes=(0, *dag.bytes),
        workspace=(0, *dag.workspace),
        forward=dag.forward + 1,
    )


class _Program:
    """The dynamic program's tables for `room` bytes, in units of memory."""

    def __init__(self, dag: Dag, reads: Sequence[int], room: int, cutoff: Cutoff) -> None:
        self.dag = dag
        count = self.count = dag.forward
        unit = gcd(*dag.bytes, *dag.workspace) or 1
        unit = unit if room // unit <= MOST_UNITS else -(-room // MOST_UNITS)
        self.units = max(0, room // unit)
        size = self.size = [-(-b // unit) for b in dag.bytes]
        work = [-(-b // unit) for b in dag.workspace]
        self.turns: list[list[int]] = [[] for _ in range(count)]
        for q, turn in enumerate(reads, start=count):
            self.turns[turn].append(q)
        pending = [0] * (count + 1)
        """by c: units of the backward output that is held when the turns of outputs c and later are over"""
        for c in reversed(range(count)):
            pending[c] = size[self.turns[c][-1]] if self.turns[c] else pending[c + 1]
        # at_turn[a]: peak of memory while the backward operators of turn a run, output a included.
        at_turn = []
        for a in range(count):
            before, most = pending[a + 1], size[a] + pending[a + 1]
            for q in self.turns[a]:
                most = max(most, size[a] + before + size[q] + work[q])
                before = size[q]
            at_turn.append(most)
        self._fill(at_turn, pending, work, cutoff)

    def _fill(self, at_turn: list[int], pending: list[int], work: list[int], cutoff: Cutoff) -> None:
        count, size = self.count, self.size
        infinity = np.inf
        best: npt.NDArray[np.float64] = np.full((count, count, self.units + 1), infinity)
        self.table = best
        """[a, c - 1, memory]: seconds"""
        self.split = np.zeros((count, count, self.units + 1), dtype=np.int64)
        for a in range(count):
            best[a, a, at_turn[a] :] = 0.0
        for a in reversed(range(count - 1)):
            cutoff.check()
            # Seconds and peak memory of running a + 1 to b, for every b.
            seconds = np.cumsum(self.dag.seconds[a + 1 : count])
            held = [size[a] + (size[b - 1] if b > a + 1 else 0) + size[b] + work[b] for b in range(a + 1, count)]
            needed = np.maximum.accumulate(held)
            for c in range(a + 2, count + 1):
                options = c - a - 1
                choice = seconds[:options, None] + best[a, a : c - 1]
                right = best[a + 1 : c, c - 1]
                shifted = np.full_like(right, infinity)
                if size[a] <= self.units:
                    shifted[:, size[a] :] = right[:, : self.units + 1 - size[a]]
                choice = choice + shifted
                memory = np.arange(self.units + 1)[None, :]
                choice[memory < needed[:options, None] + pending[c]] = infinity
                index = choice.argmin(axis=0)
                best[a, c - 1] = choice[index, np.arange(self.units + 1)]
                self.split[a, c - 1] = index + a + 1

    def sequence(self) -> list[int] | None:
        """The operators in the order of their runs; None: no choice of checkpoints fits."""
        if not np.isfinite(self.table[0, self.count - 1, self.units]):
            return None
        sequence: list[int] = [0]
        self._follow(sequence)
        return sequence

    def _follow(self, sequence: list[int]) -> None:
        """Append the runs of the whole chain that follow the first run of operator 0."""
        stack = [(0, self.count, self.units)]
        while stack:
            a, c, memory = stack.pop()
            if c == a + 1:
                sequence.extend(self.turns[a])
                continue
            b = int(self.split[a, c - 1, memory])
            sequence.extend(range(a + 1, b + 1))
            stack.append((a, b, memory))
            stack.append((b, c, memory - self.size[a]))


def _reruns(dag: Dag, sequence: list[int]) -> frozenset[Rerun]:
    """The re-runs of a sequence of runs: every run that is not its operator's first."""
    result: set[Rerun] = set()
    done = 0
    waiting: list[int] = []
    for operator in sequence:
        if operator == done:
            result.update((operator, again) for again in waiting)
            waiting = []
            done += 1
        else:
            waiting.append(operator)
    return pruned(dag, result)
