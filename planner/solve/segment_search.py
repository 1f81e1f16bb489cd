"""Which layers to run forward twice: segmentations, ranked by the restricted master problem over the columns known already."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tightfit.planner.problem.layer_types import Layered, transfer_seconds
from tightfit.planner.schedule.multi_layer_recompute import Segments, entering, equal_segments, repeatable
from tightfit.planner.search_options import Progress
from tightfit.planner.solve.column_generation import ColumnGeneration
from tightfit.planner.solve.master_lp import MasterLp
from tightfit.planner.solve.pricing import Pool

MOST = 4
"""segmentations that are planned in full"""
TOLERANCE = 8e-3
"""relative, of the search for columns"""
SLACK = 0.05
"""share of a step by which the model may overstate it: it counts a second pass as a whole forward"""


def moved_and_rerun(problem: Layered) -> tuple[float, float]:
    """(seconds to move a layer input to the disk and back, seconds to run the layer before it again): means over the
    layers that may run twice; (0, 0) without two such layers in a row.
    """
    device = problem.profile.device
    moved, rerun = [], []
    for first, last in repeatable(problem):
        for layer in range(first + 1, last + 1):
            sizes = [
                problem.graph.storages[name].bytes
                for name in entering(problem, (layer, layer))
                if name not in problem.forced
            ]
            moved.append(
                sum(transfer_seconds(device.write, size) + transfer_seconds(device.read, size) for size in sizes)
            )
            rerun.append(sum(step.seconds for step in problem.forward_steps[layer - 1]))
    return (sum(moved) / len(moved), sum(rerun) / len(rerun)) if moved else (0.0, 0.0)


def worthwhile(problem: Layered) -> bool:
    """Whether layers in a row are run again sooner, in the mean, than their inputs are moved to the disk and back.

    Where they are not, segments seldom gain anything: a segment of k layers runs k - 1 of them again and spares the inputs of k - 1.
    That says whether to look for segments, and proves nothing: single layers may differ from the mean, and a disk that other
    transfers keep busy makes moving dearer than it is by itself.
    """
    moved, rerun = moved_and_rerun(problem)
    return moved > rerun


def segmentations(problem: Layered) -> Iterator[Segments]:
    """Segments of equal length, over all layers that may run twice or over the earlier half of them, whose inputs are held longest."""
    count = len(problem.layer_type)
    root = math.isqrt(count)
    seen: set[Segments] = set()
    for length in sorted({2, 3, 4, root, 2 * root}):
        whole = equal_segments(problem, length)
        for segments in (whole, whole[: len(whole) // 2]):
            if segments and segments not in seen:
                seen.add(segments)
                yield segments


def promising(
    pool: Pool, limit: int, deadline: float, progress: Progress | None = None
) -> list[tuple[float, ColumnGeneration]]:
    """(seconds, search under a segmentation): those whose steps are the shortest by the model within `limit` bytes, in that order.

    Raises TimeoutError where the deadline strikes first.
    """
    found: list[tuple[float, ColumnGeneration]] = []
    for segments in segmentations(pool.problem):
        search = ColumnGeneration(
            relaxation=MasterLp(pool, careful=True, segments=segments),
            limit_bytes=limit,
            deadline=deadline,
            tolerance=TOLERANCE,
            progress=progress,
        )
        seconds, fits = search.relaxed_seconds(search.limit_bytes)
        if fits:
            found.append((seconds, search))
    return sorted(found, key=lambda one: one[0])[:MOST]
