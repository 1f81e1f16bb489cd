"""Whole columns for a first schedule: greedily, by time saved per byte, without a solver."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.schedule.column_bytes import charged_bytes
from tightfit.planner.schedule.layer_schedule import Column


def greedy(problem: LayeredStep, columns: Sequence[Sequence[Column]], limit_bytes: int) -> tuple[Column, ...] | None:
    """Of the `columns` of each layer type: from the smallest on, exchange them in the order of time saved per byte, as
    far as the limit allows.

    Time is that of computation and disk together, though they may overlap. None where even the smallest columns do not
    fit.
    """
    count = len(problem.layer_type)

    def size(column: Column) -> float:
        """Bytes: what every layer holds at once counts as such, peaks, of which there is one at a time, as one layer's
        share.
        """
        return column.between + column.outside + max(column.forward_peak, column.backward_peak) / count

    chosen = [min(columns[kind], key=size) for kind in problem.layer_type]
    if charged_bytes(problem, tuple(chosen)) > limit_bytes:
        return None
    # Each layer keeps the latest exchange that fits and is faster than the one before.
    exchanges = sorted(
        (
            (-(_time(start) - _time(column)) / max(1, size(column) - size(start)), layer, index)
            for layer, (kind, start) in enumerate(zip(problem.layer_type, chosen))
            for index, column in enumerate(columns[kind])
            if _time(column) < _time(start)
        ),
    )
    for _, layer, index in exchanges:
        column = columns[problem.layer_type[layer]][index]
        if _time(column) >= _time(chosen[layer]):
            continue
        previous, chosen[layer] = chosen[layer], column
        if charged_bytes(problem, tuple(chosen)) > limit_bytes:
            chosen[layer] = previous
    return tuple(chosen)


def _time(column: Column) -> float:
    return (
        column.core_seconds
        + column.spills_forward
        + column.fetches_backward
        + column.states_fetched
        + column.states_spilled
    )
