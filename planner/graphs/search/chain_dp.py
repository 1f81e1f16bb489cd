"""Checkpoints of a chain by dynamic programming: a forward in which each operator reads the one before, and a backward that
reads the forward's outputs from last to first.

With output a held, ``best[a][c]`` is the least time of forward re-runs for the backward operators that read outputs a to c - 1, by
memory: hold a further output b in between, do what reads b to c - 1, then what reads a to b - 1. For equal operators this is the optimum
(Griewank and Walther 2000, Algorithm 799); for unequal ones the best schedule that holds what it once stores (Beaumont et al.
2019, Rotor).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import numpy.typing as npt

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, pruned

MOST_UNITS = 512
"""memory is counted in at most so many units; sizes are rounded up to them"""
LONGEST = 160
"""forward operators; the work grows with their third power"""


@dataclass(frozen=True, kw_only=True)
class Chain:
    reads: tuple[int, ...]
    """per backward operator the forward output in whose turn it runs, from last to first"""


def as_chain(dag: Dag) -> Chain | None:
    """The graph as a chain, None where it is none."""
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
    return Chain(reads=tuple(reads))


def checkpoints(
    dag: Dag, chain: Chain, budget_bytes: int, *, late: Callable[[], bool] = lambda: False
) -> frozenset[Rerun] | None:
    """The re-runs of the best checkpoints within the budget, None where no choice of checkpoints fits.

    Raises TimeoutError where `late` says so before that is known.
    """
    room = budget_bytes - dag.fixed_bytes
    if dag.inputs[0] or not dag.recomputable[0]:
        sequence = _Program(dag, chain, room, late).sequence()
    else:
        # Output 0 need not be held: it is made again from one before it, which takes no bytes and no time.
        before = _Program(_after_nothing(dag), Chain(reads=tuple(turn + 1 for turn in chain.reads)), room, late)
        held = before.sequence()
        sequence = None if held is None else [operator - 1 for operator in held[1:]]
    return None if sequence is None else _reruns(dag, sequence)


def _after_nothing(dag: Dag) -> Dag:
    """The chain with an operator before its first that makes nothing in no time: what `_Program` reads of it."""
    return replace(
        dag,
        seconds=(0.0, *dag.seconds),
        bytes=(0, *dag.bytes),
        workspace=(0, *dag.workspace),
        forward=dag.forward + 1,
    )


class _Program:
    def __init__(self, dag: Dag, chain: Chain, room: int, late: Callable[[], bool]) -> None:
        self.dag = dag
        count = self.count = dag.forward
        unit = gcd(*dag.bytes, *dag.workspace) or 1
        unit = unit if room // unit <= MOST_UNITS else -(-room // MOST_UNITS)
        self.units = max(0, room // unit)
        size = self.size = [-(-b // unit) for b in dag.bytes]
        work = [-(-b // unit) for b in dag.workspace]
        self.turns: list[list[int]] = [[] for _ in range(count)]
        for q, turn in enumerate(chain.reads, start=count):
            self.turns[turn].append(q)
        pending = [0] * (count + 1)
        """what the backward has left behind when output c is next to be read no more"""
        for c in reversed(range(count)):
            pending[c] = size[self.turns[c][-1]] if self.turns[c] else pending[c + 1]
        # at_turn[a]: memory while the backward operators of turn a run.
        at_turn = []
        for a in range(count):
            before, most = pending[a + 1], size[a] + pending[a + 1]
            for q in self.turns[a]:
                most = max(most, size[a] + before + size[q] + work[q])
                before = size[q]
            at_turn.append(most)
        self._fill(at_turn, pending, work, late)

    def _fill(self, at_turn: list[int], pending: list[int], work: list[int], late: Callable[[], bool]) -> None:
        count, size = self.count, self.size
        infinity = np.inf
        best: npt.NDArray[np.float64] = np.full((count, count, self.units + 1), infinity)
        self.table = best
        """[a, c - 1, memory]: seconds"""
        self.split = np.zeros((count, count, self.units + 1), dtype=np.int64)
        for a in range(count):
            best[a, a, at_turn[a] :] = 0.0
        for a in reversed(range(count - 1)):
            if late():
                raise TimeoutError
            # Seconds and memory of the runs from a to b, for every b.
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
        """Append the runs of the whole chain, output 0 made."""
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
    """What of a sequence of runs is not an operator's first."""
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
