"""Chooses how many tokens go through a layer at a time: the fewest whose products keep their speed on this machine.

``python -m tightfit.profiles.measuring.tile_rates`` is the process that times the products, in the environment of a
run: of so many tokens with the model's widest matrix, forward and backward. What it finds is kept with the machine's
other figures.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tightfit.profiles.measuring.cpu_load import OtherPrograms
from tightfit.profiles.measuring.kept_figures import KeptFigures
from tightfit.profiles.measuring.memory import PRODUCT_BYTES, START_BYTES, WORKSPACE_BYTES, plain_bytes
from tightfit.profiles.worker_process import run_worker, work
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.engine.start import lean_torch
from tightfit.runtime.engine.start.process import child_environment, leave
from tightfit.runtime.engine.weights.layout import ELEMENT_BYTES, Entry

MODULE = "tightfit.profiles.measuring.tile_rates"
FEWEST, MOST = 64, 2048
"""tokens of the smallest and the largest tile that are tried"""
MOST_TILES = 32
"""tiles of a step: more take long to trace and to plan"""
APART = 1.5
"""ratio of two sizes that are tried, at least"""
KEPT = 0.95
"""share of the best rate at which products are said to keep their speed"""
MATRIX_BYTES = 16 * MIB
"""of the matrix's rows that are multiplied"""
ROUNDS = 7


def tried_sizes(fitting: Sequence[int], tokens: int) -> list[int]:
    """Those of the `fitting` sizes of tiles of a step of so many `tokens`, all of them included, that are worth trying;
    smallest first.
    """
    least = max(FEWEST, -(-tokens // MOST_TILES))
    tried: list[int] = []
    for size in sorted({*fitting, tokens}):
        if size >= least and (not tried or APART * tried[-1] <= size <= MOST):
            tried.append(size)
    return tried or [tokens]


def widest(entries: Mapping[str, Entry]) -> tuple[int, int]:
    """(rows, columns) of the largest matrix of a shape that several have, as those of layers do; of the largest where
    there is none.
    """
    shapes = Counter((entry.rows, entry.columns) for entry in entries.values() if len(entry.shape) == 2)
    several = [shape for shape, count in shapes.items() if count > 1]
    return max(several or shapes, key=lambda shape: (shape[0] * shape[1], shape))


def smallest_fast(rates: Mapping[int, float]) -> int:
    """The smallest size whose rate, in tokens a second, is `KEPT` of the best at least."""
    return min(size for size, rate in rates.items() if rate >= KEPT * max(rates.values()))


def fast_tile(
    sizes: Sequence[int],
    entries: Mapping[str, Entry],
    *,
    dtype: str,
    threads: int,
    memory: int | None,
    kept: Path,
    anew: bool,
    progress: Progress | None,
) -> int:
    """The smallest of the `sizes` at which products with the widest of the matrices `entries` keep their speed.

    `memory`: bytes that measuring may hold; `kept`: the file with what was measured of this machine, unless it is
    measured `anew`. Raises InputError where `memory` is too little, RunError where the process fails.
    """
    if len(sizes) == 1:
        return sizes[0]
    rows, columns = widest(entries)
    element = ELEMENT_BYTES[dtype]
    rows = min(rows, max(1, MATRIX_BYTES // (element * columns)))
    held = element * (rows * columns + max(sizes) * (rows + 2 * columns))
    needed = plain_bytes() + START_BYTES + WORKSPACE_BYTES + held + 2 * len(sizes) * PRODUCT_BYTES
    if memory is not None and needed > memory:
        raise InputError(
            f"{spelled('tile')} 0: measuring products takes {format_size(needed)}, {format_size(memory)} are given for"
            f" it; give the tokens of a tile, for example {sizes[0]}"
        )
    request = {
        "shape": [rows, columns],
        "sizes": list(sizes),
        "dtype": dtype,
        "threads": threads,
        "kept": str(kept),
        "anew": anew,
    }
    seconds: dict[str, float] = run_worker(
        interpreter.command(MODULE),
        request,
        child_environment(threads),
        doing="measuring products",
        predicted_bytes=needed,
        instead=f"give {spelled('tile')} a number of tokens",
        on_message=lambda message: progress and progress(message["stage"], message["done"], message["total"]),
    )
    return smallest_fast({size: size / seconds[str(size)] for size in sizes})


def measure(request: Mapping[str, Any], report: Progress) -> dict[str, float]:
    """Seconds of the products forward and backward by number of tokens."""
    import torch

    from tightfit.profiles.measuring.bandwidth import reference_seconds
    from tightfit.runtime.engine.cpu.products import multiply

    load, kept = OtherPrograms(), KeptFigures.of_request(request)
    kept.check(reference_seconds())
    (rows, columns), sizes, dtype = request["shape"], request["sizes"], getattr(torch, request["dtype"])
    key = [rows, columns, request["dtype"]]
    known = {size: kept.known("tile", [*key, size]) for size in sizes}
    if None in known.values():
        matrix = torch.randn(rows, columns).to(dtype)
        given, result = torch.randn(max(sizes), columns).to(dtype), torch.empty(max(sizes), columns, dtype=dtype)
        made = torch.empty(max(sizes), rows, dtype=dtype)
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for turn in range(ROUNDS + 1):
            for size in sizes:
                begin = time.perf_counter()
                multiply((given[:size], matrix.T, 1.0), out=made[:size])
                multiply((made[:size], matrix, 1.0), out=result[:size])
                times[size].append(time.perf_counter() - begin)
            report("measure", turn, ROUNDS)
        # The first round builds the kernels.
        known = {size: kept.note("tile", [*key, size], statistics.median(times[size][1:])) for size in sizes}
        kept.save(load.taken(request["threads"]), request["threads"])
    return {str(size): seconds for size, seconds in known.items()}


def main() -> int:
    lean_torch.load()
    return work(measure)


if __name__ == "__main__":
    leave(main)
