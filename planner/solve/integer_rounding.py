"""Whole columns near a mixture, found without an integer program.

The restricted master problem mixes columns; a plan needs one per layer. What the mixtures hold in every window, and
what they leave free there, is known: a combination that holds no more than both together in any window keeps the limit,
unless its transfers come at worse times. Within these capacities goes a local search (a multidimensional
multiple-choice knapsack: one column per layer, one constraint per window): shares are rounded, columns exchanged until
all fit, then one or two at a time so that the step gets shorter at the mixture's prices of time. It is the first stage
of (23) in docs/formulation.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.problem.layer_figures import FIELDS
from tightfit.planner.solve.pricing import ROUNDING, Prices

EXCHANGES = 60
"""changes of one layer for each of which the best second change is looked for"""
REPAIRING = 8
"""candidates of each layer that are tried while a combination is made to fit"""
STEPS = 4
"""changes at most, per layer: until all columns fit, and as many after that"""
LITTLE = 1e-3
"""ms; what gains less is not changed"""
Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]
BETWEEN, OUTSIDE, INSTRUCTIONS = (FIELDS.index(name) for name in ("between", "outside", "instructions"))
PEAKS = [FIELDS.index(name) for name in ("forward_peak", "backward_peak", "evaluate_peak")]
BYTES = [BETWEEN, OUTSIDE, INSTRUCTIONS, *PEAKS]
"""those of FIELDS that count as bytes in windows; the others are time"""


def rounded(kinds: Sequence[int], shares: Sequence[Floats]) -> list[int]:
    """A column per layer, from the shares of its type's columns, rounded so that up to any layer each column is taken
    about as often as the shares up to there add up to.
    """
    owed: dict[int, Floats] = {}
    picks = []
    for kind, layer_shares in zip(kinds, shares):
        total = layer_shares + owed.get(kind, 0.0)
        picks.append(int(np.argmax(np.where(layer_shares > 1e-6, total, -np.inf))))
        total[picks[-1]] -= 1.0
        owed[kind] = total
    return picks


class WindowBytes:
    """What a combination of columns may hold, and holds, in KiB, in every layer's forward, backward and evaluation
    window.
    """

    def __init__(self, spare: Floats, mixtures: Floats, instruction_kib: float) -> None:
        """`spare`: (3, layers), KiB at least that are free in each window beside what `mixtures`, (layers, FIELDS),
        hold.
        """
        self._instruction_kib = instruction_kib
        self.capacity = spare + self.held(mixtures)

    def held(self, figures: Floats) -> Floats:
        """(3, layers): KiB in each window, without what all combinations have in common; `figures`: (layers,
        FIELDS).
        """
        between, outside = figures[:, BETWEEN], figures[:, OUTSIDE]
        before = np.cumsum(between) - between
        after = outside.sum() - np.cumsum(outside)
        training = before + after
        others = np.stack([training, training, outside.sum() - outside])
        held: Floats = others + figures[:, PEAKS].T + self._instruction_kib * figures[:, INSTRUCTIONS].sum()
        return held

    def free(self, figures: Floats) -> Floats:
        """(3, layers): KiB of the capacity that a combination leaves; below zero where it holds too much."""
        return self.capacity - self.held(figures)

    def fits(self, free: Floats, change: Floats) -> NDArray[np.bool_]:
        """Whether each of the changes, (layers, candidates, FIELDS), of one layer each, fits into what is `free`."""
        grown = self._grown(change)
        before, after, elsewhere = _around(free)
        least = np.min(free.T[:, None, :] - grown[..., PEAKS], axis=-1)
        least = np.minimum(least, after[:, None] - grown[..., BETWEEN])
        least = np.minimum(least, np.minimum(before, elsewhere)[:, None] - grown[..., OUTSIDE])
        fits: NDArray[np.bool_] = least >= -ROUNDING
        return fits

    def excess(self, free: Floats, layer: int, change: Floats) -> Floats:
        """KiB over capacity, added up over all windows, after each change, (candidates, FIELDS), of one layer."""
        grown = self._grown(change)
        between, outside = grown[:, BETWEEN, None], grown[:, OUTSIDE, None]
        turn = np.arange(free.shape[1])
        training = np.where(turn > layer, between, outside)
        total = np.zeros(len(change))
        for window, (others, peak) in enumerate(zip((training, training, outside), PEAKS)):
            grows = np.where(turn == layer, grown[:, peak, None], others)
            total += np.maximum(grows - free[window], 0.0).sum(axis=-1)
        return total

    def _grown(self, change: Floats) -> Floats:
        """Changes with the bytes of their instructions added to every figure, as they are held in every window."""
        grown: Floats = change + self._instruction_kib * change[..., INSTRUCTIONS, None]
        return grown


def _around(free: Floats) -> tuple[Floats, Floats, Floats]:
    """Per layer: the least that is free in training windows of the layers before it, of those after it, and in
    evaluation windows of the others.
    """
    training = free[:2].min(axis=0)
    before, after = np.full(len(training), np.inf), np.full(len(training), np.inf)
    before[1:] = np.minimum.accumulate(training)[:-1]
    after[:-1] = np.minimum.accumulate(training[::-1])[::-1][1:]
    evaluate = free[2]
    least = evaluate.argmin()
    elsewhere = np.full(len(evaluate), evaluate[least])
    elsewhere[least] = np.delete(evaluate, least).min(initial=np.inf)
    return before, after, elsewhere


class ColumnRounding:
    """The local search over combinations of one column per layer.

    `candidates`: per layer, indices into its type's columns, best first; `figures`: per layer, FIELDS of all of these
    columns.
    """

    def __init__(
        self,
        kinds: Sequence[int],
        figures: Sequence[Floats],
        prices: Sequence[Prices],
        candidates: Sequence[Sequence[int]],
    ) -> None:
        width = max(map(len, candidates))
        # Layers with fewer candidates have their first one several times.
        self._candidates = np.array([[*indices, *[indices[0]] * (width - len(indices))] for indices in candidates])
        self._repeated = np.arange(width) >= np.array([len(indices) for indices in candidates])[:, None]
        self._figures = np.stack([rows[indices] for rows, indices in zip(figures, self._candidates)])
        time_prices = np.stack(prices)
        time_prices[:, BYTES] = 0.0
        self._cost = np.einsum("lcf,lf->lc", self._figures, time_prices)
        self._layers = np.arange(len(candidates))
        count = 1 + int(self._candidates.max())
        # A layer type's column as one number.
        self._columns = np.array(kinds)[:, None] * count + self._candidates
        self._column_count = count * (1 + max(kinds))

    def fitted(self, windows: WindowBytes, picks: Sequence[int], cutoff: Cutoff = NEVER) -> list[int] | None:
        """A combination that fits, near `picks` (per layer, an index into its type's columns); None: none was found.

        Raises TimeoutError where `cutoff` strikes.
        """
        chosen = (self._candidates == np.array(picks)[:, None]).argmax(axis=1)
        if not self._repair(windows, chosen, cutoff):
            # Start again from the columns that hold least: they are the likeliest to fit, and are improved from there.
            chosen = self._figures[..., BYTES].sum(axis=-1).argmin(axis=1)
            if not self._repair(windows, chosen, cutoff):
                return None
        for _ in range(STEPS * len(self._layers)):
            cutoff.check()
            if not (self._improve(windows, chosen) or self._exchange(windows, chosen)):
                break
        return [int(pick) for pick in self._candidates[self._layers, chosen]]

    def _chosen(self, chosen: Numbers) -> Floats:
        figures: Floats = self._figures[self._layers, chosen]
        return figures

    def _changes(self, chosen: Numbers) -> Floats:
        """(layers, candidates, FIELDS): each candidate's figures less those of the one chosen."""
        return self._figures - self._chosen(chosen)[:, None]

    def _costs(self, chosen: Numbers) -> Floats:
        """(layers, candidates): each candidate's ms less those of the one chosen."""
        costs: Floats = self._cost - self._cost[self._layers, chosen][:, None]
        return costs

    def _repair(self, windows: WindowBytes, chosen: Numbers, cutoff: Cutoff) -> bool:
        """Change one layer after the other, each time for the most bytes over capacity per ms, until all fit; whether
        they do.
        """
        for _ in range(STEPS * len(self._layers)):
            free = windows.free(self._chosen(chosen))
            if (free >= -ROUNDING).all():
                return True
            cutoff.check()
            over = np.maximum(-free, 0.0).sum()
            changes = self._changes(chosen)[:, :REPAIRING]
            excess = np.stack([windows.excess(free, layer, change) for layer, change in enumerate(changes)])
            worth = (over - excess) / np.maximum(self._costs(chosen)[:, :REPAIRING], LITTLE)
            # Changes that relieve next to nothing, at next to no cost, would come before those that help.
            worth[excess >= (1 - 1e-3) * over] = -np.inf
            layer, candidate = divmod(int(np.argmax(worth)), worth.shape[1])
            if worth[layer, candidate] == -np.inf:
                break
            chosen[layer] = candidate
        return False

    def _improve(self, windows: WindowBytes, chosen: Numbers) -> bool:
        """Make the change that fits and saves most time; whether there is one."""
        layer, candidate, ms = self._best(windows, chosen)
        if ms >= -LITTLE:
            return False
        chosen[layer] = candidate
        return True

    def _best(self, windows: WindowBytes, chosen: Numbers) -> tuple[int, int, float]:
        """(layer, candidate, ms) of the change that costs least among those that fit."""
        fits = windows.fits(windows.free(self._chosen(chosen)), self._changes(chosen))
        costs = np.where(fits, self._costs(chosen), np.inf)
        layer, candidate = divmod(int(np.argmin(costs)), costs.shape[1])
        return layer, candidate, float(costs[layer, candidate])

    def _exchange(self, windows: WindowBytes, chosen: Numbers) -> bool:
        """Make two changes that save time together, of which one makes room for the other; whether there are any."""
        costs = self._costs(chosen)
        for layer, candidate in self._single(chosen, costs):
            trial = chosen.copy()
            trial[layer] = candidate
            other, other_candidate, ms = self._best(windows, trial)
            if ms + costs[layer, candidate] < -LITTLE:
                trial[other] = other_candidate
                chosen[:] = trial
                return True
        return False

    def _single(self, chosen: Numbers, costs: Floats) -> list[tuple[int, int]]:
        """(layer, candidate) of first changes to try, those that make least difference in time first; of those that
        change the same column of a type to the same other one, in a first, a middle and a last layer.
        """
        others = ~self._repeated
        others[self._layers, chosen] = False
        layers, candidates = np.nonzero(others)
        current = self._columns[self._layers, chosen][layers]
        alike = current * self._column_count + self._columns[layers, candidates]
        order = np.lexsort((layers, alike, abs(costs[layers, candidates])))
        groups: dict[int, list[int]] = {}
        for position, number in zip(order.tolist(), alike[order].tolist()):
            groups.setdefault(number, []).append(position)
        spread = [
            members[turn] for members in groups.values() for turn in sorted({0, len(members) // 2, len(members) - 1})
        ]
        return [(int(layers[first]), int(candidates[first])) for first in spread[:EXCHANGES]]
