"""Bare graphs at budgets of 0.8, 0.6 and 0.4 of the keep-all peak: the planner, its gap, and the alternatives on the
same graph under the same simulator.

    python tests/benchmarks/graphs.py [--time-limit 60] [--only VGG-16,...] [--shares 0.8,0.6,0.4] [--json FILE]

Times are parts of keep-all's; a dash means that the alternative does not fit. "torch" is the fastest that fits of what
PyTorch's activation memory budget solvers (`torch._functorch`, dynamic programming and greedy) save, over budgets of
theirs, with the rest made again once in the backward.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from functools import lru_cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]

import tables
from layered_graph import layered
from networks import NETWORKS, network
from rich.table import Table

from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.schedule import peak_bytes, seconds
from tightfit.planner.graphs.search.baselines import RULES, remade, rules_for
from tightfit.profiles.graph_input import graph_profile

MIB = 1 << 20
GRAPHS = {name: (lambda name=name: network(name)) for name in NETWORKS}
GRAPHS |= {f"layered {count}": (lambda count=count: layered(count)) for count in (100, 400, 1000)}
GRAPHS |= {
    f"layered training {count}": (lambda count=count: layered(count, training=True)) for count in (100, 400, 1000)
}


HEADINGS = (
    "graph",
    "operators",
    "of keep-all's peak",
    "MiB",
    "time",
    "gap",
    "to any schedule",
    "checkpoint-layers",
    "checkpoint-sqrt",
    "torch",
    "wall / CPU s",
)
NOTES = (
    "Training graphs of published networks at the papers' batch sizes (256, 256, 32, 512) and random layered graphs, seconds estimated"
    ' for a V100. Times are parts of keep-all\'s; gaps are to the proven bounds of the class and of any schedule; "torch" is the best of'
    ' what the activation-memory-budget solvers of PyTorch save; a dash: does not fit. "None found" is no proof; "none fits" is one, for'
    " schedules with first runs and re-runs in this order."
)


def torch_knapsack(dag):
    """(peak, seconds) of what PyTorch's solvers save, over their budgets."""
    from torch._functorch._activation_checkpointing.knapsack import dp_knapsack, greedy_knapsack

    items = [i for i in range(dag.forward) if dag.bytes[i] and any(user >= dag.forward for user in dag.users[i])]
    whole = sum(dag.bytes[i] for i in items)
    sizes, times = [dag.bytes[i] / whole for i in items], [dag.seconds[i] for i in items]
    found = set()
    for step in range(41):
        for solver in (dp_knapsack, greedy_knapsack):
            _, saved, _ = solver(sizes, times, step / 40)
            reruns = remade(dag, [items[k] for k in saved])
            found.add((peak_bytes(dag, reruns), seconds(dag, reruns)))
    return sorted(found)


def fastest(points, budget):
    return min((time_ for peak, time_ in points if peak <= budget), default=None)


def measure(name, shares, limit):
    profile = graph_profile(GRAPHS[name]())
    dag = dag_of(profile)
    top, once = peak_bytes(dag, ()), dag.once_seconds
    planner = GraphPlanner(profile)
    others = {
        rule: [(peak_bytes(dag, reruns), seconds(dag, reruns))]
        for rule in rules_for(dag)
        for reruns in [RULES[rule](dag)]
    }
    others["torch"] = torch_knapsack(dag) if dag.forward < len(dag) else []
    for share in shares:
        budget = int(share * top)
        cpu, wall = time.process_time(), time.monotonic()
        made = planner.plan(budget, time_limit=limit)
        row = {
            "graph": name,
            "operators": len(dag),
            "share": share,
            "budget_mib": budget // MIB,
            "status": made.status,
            "wall_seconds": time.monotonic() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "deterministic": made.deterministic,
        }
        if not made.fits:
            row["minimum_share"] = made.minimum_budget_bytes / top
            row["surely"] = planner.lowest_bytes > budget
        else:
            row |= {
                "peak_mib": made.peak_bytes // MIB,
                "time": made.step_seconds / once,
                "gap": made.gap,
                "any_gap": made.any_schedule_gap,
            }
            for rule in ("checkpoint-layers", "checkpoint-sqrt", "torch"):
                other = fastest(others.get(rule, []), budget)
                row[rule] = None if other is None else other / once
                assert other is None or other >= made.step_seconds * (1 - 1e-12), (name, share, rule)
        yield row


def cells(row):
    """The row of the table, one text for each of `HEADINGS`."""
    head = [row["graph"], str(row["operators"]), str(row["share"]), f"{row['budget_mib']:,}"]
    clock = f"{row['wall_seconds']:.0f} / {row['cpu_seconds']:.0f}"
    if row["status"] in ("infeasible", "unknown"):
        how = "none fits with first runs and re-runs in this order" if row["surely"] else "none found"
        return [*head, f"{how}: smallest {row['minimum_share']:.3f}", *["–"] * 5, clock]
    others = [f"{row[rule]:.4f}" if row[rule] else "–" for rule in ("checkpoint-layers", "checkpoint-sqrt", "torch")]
    proven = "optimal" if row["status"] == "optimal" else f"{row['gap']:.2%}"
    return [*head, f"{row['time']:.4f}", proven, f"{row['any_gap']:.2%}", *others, clock]


@lru_cache
def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(GRAPHS))
    parser.add_argument(
        "--shares", type=lambda text: [float(part) for part in text.split(",")], default=[0.8, 0.6, 0.4]
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/graphs.md")
    return parser.parse_args()


def main():
    options = arguments()
    table = Table(*HEADINGS)
    rows = []
    for name in options.only:
        for row in measure(name, options.shares, options.time_limit):
            rows.append(row)
            table.add_row(*cells(row))
            print(" | ".join(cells(row)), file=sys.stderr, flush=True)
    report = tables.Report()
    report.table(table)
    report.text(f"Most memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB.")
    if options.write:
        report.write("graphs", "Planning bare graphs", NOTES)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
