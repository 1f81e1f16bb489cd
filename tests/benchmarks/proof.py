"""Thousands of small graphs searched by brute force for one that contradicts the planner: its optimum, its smallest
budget, its bounds.

    python tests/benchmarks/proof.py [--graphs 20000] [--with-disk 4000] [--chains 40]

The checks are those of the tests, on graphs that the tests do not use. Stops at the first contradiction, naming the
graph's seed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "planner" / "graphs")]

import test_graphs
import test_offload
from brute_force import Chain
from decisions import INSTANT
from synthetic import device, small_chain

from tightfit.planner.model_planner import ModelPlanner

FIRST = 100_000
"""seed of the first graph"""
MOST_DECISIONS = 8000
"""of a chain of layers that is tried out"""


def main(
    graphs: Annotated[int, typer.Option(help="bare graphs of 2 to 7 operators")] = 20_000,
    with_disk: Annotated[
        int, typer.Option(help="bare graphs of 2 to 5 operators that may move outputs to a disk")
    ] = 4_000,
    chains: Annotated[int, typer.Option(help="chains of layers, with every decision there is tried")] = 40,
) -> None:
    """Compare and count."""
    begun = time.process_time()
    for seed in range(FIRST, FIRST + graphs):
        test_graphs.check_small_graph(seed)
    print(
        f"{graphs} graphs: optimum, smallest budget and bounds agree ({time.process_time() - begun:.0f} CPU s)",
        flush=True,
    )
    begun = time.process_time()
    moved = sum(test_offload.check_small_graph(seed, most=5) for seed in range(FIRST, FIRST + with_disk))
    took = time.process_time() - begun
    print(f"{with_disk} graphs with a disk: the same, {moved} of them move something ({took:.0f} CPU s)", flush=True)
    begun = time.process_time()
    tried = decisions = 0
    seed = FIRST
    while tried < chains:
        count = check_chain(seed)
        tried, decisions, seed = tried + bool(count), decisions + count, seed + 1
    took = time.process_time() - begun
    print(f"{tried} chains of layers: no decision of {decisions} beats bound or minimum ({took:.0f} CPU s)")


def check_chain(seed: int) -> int:
    """How many decisions were tried; 0: the chain has too many."""
    profile = small_chain(seed, on=device(**INSTANT))
    chain = Chain(profile)
    if chain.count() >= MOST_DECISIONS:
        return 0
    everything = list(chain.all())
    planner = ModelPlanner(profile)
    smallest = min(peak for peak, _ in everything)
    assert planner.minimum_bytes() == smallest, seed
    assert not planner.plan(smallest - 1).fits, seed
    for budget in (smallest, 5 * smallest // 4):
        best = min(seconds for peak, seconds in everything if peak <= budget)
        made = planner.plan(budget)
        assert made.any_schedule_bound_seconds <= best * (1 + 1e-9), (seed, budget)
        assert abs(made.bound_seconds - best) <= 2e-4 * best, (seed, budget)
        assert made.step_seconds >= best * (1 - 1e-9), (seed, budget)
    return len(everything)


if __name__ == "__main__":
    typer.run(main)
