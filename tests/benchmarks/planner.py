"""How long planning takes and how near the bound it comes: decoders of published shapes, against every fixed rule.

Prints tables and, with --output, writes the figures as JSON. CPU seconds: a plan uses one thread, and other processes
do not count; a curve is planned by two processes, and timed by the clock. "torch" is the fastest that fits of what
PyTorch's activation memory budget solvers (`torch._functorch`) save, weights unpacked or streamed, the rest made again.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]

import tables
from layered_graph import layered
from shapes import decoder_profile

from tightfit.planner.compare import compare
from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.fleet_planner import plan_fleet
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.schema import FleetPlan, Link
from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.schedule.column_bytes import charged_bytes
from tightfit.planner.schedule.layer_schedule import Column, Decision, measure
from tightfit.planner.schedule.realize import realize
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import SearchProgress
from tightfit.planner.solve.policies import POLICIES, checkpoint_layers, mebp, rule_columns
from tightfit.profiles.devices.data_sheets import find_device
from tightfit.profiles.devices.estimate import estimate_profile
from tightfit.profiles.graph_input import graph_profile
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.units import MIB, format_size

SHARES = (0.02, 0.1, 0.25, 0.5, 1.0)
"""budgets, from the smallest to keep-all"""
LIMITS = (1.0, 3.0, 6.0)
"""seconds, of searches that take longer"""
CURVE = tuple(SHARES[0] + (1 - SHARES[0]) * i / 11 for i in range(12))
"""budgets between the same ends"""
NEAR, ROOMIER = (1.02, 1.05, 1.1, 1.2, 1.3), (8.0, 4.0, 2.0)
"""budgets in times the smallest, and those that a planner meets before it comes down to them"""

OVER_TIME: dict[str, tuple[int, int, dict[str, Any], tuple[int, ...]]] = {
    "0.5 B": (
        24,
        256,
        {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
        (200, 320),
    ),
    "3 B": (36, 256, {}, (300, 662)),
    "a mixture of 30 B": (
        48,
        1024,
        {
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "tie_word_embeddings": False,
        },
        (400,),
    ),
    "70 B": (
        80,
        512,
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192,
            "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        },
        (600, 1024),
    ),
}  # fmt: skip
"""name -> (layers, tokens, fields of the config beside those of Qwen2.5-3B, budgets in MiB)"""
GRAPHS_OVER_TIME = ((100, False, 0.8), (100, True, 0.6), (400, False, 0.8), (400, True, 0.8))
"""of bare graphs: operators, whether with a backward, and the budget in shares of what keeping everything takes"""
FLEETS_OVER_TIME = ("0.5 B", "3 B")
FLEET = {"zen5-2core": 900, "zen4-2core": 700, "zen3-2core": 500, "raspberry-pi-5": 400}
"""the devices of a fleet, with their budgets in MiB"""
LINK = Link(up_bytes_per_second=125e6, down_bytes_per_second=125e6, latency_seconds=1e-4)
CARRIED_OUT = ("carried out", "fits", "improved and bounded", "sharing out micro-batches", "cutting the model")
"""stages of searches at which the best plan is one that can be carried out"""
WITHIN = (0.01, 0.003)
"""gaps to the last bound of a search, of which is said when its best plan was that near"""


NOTES = (
    "How long planning takes, and how near the best the plans are. LoRA of rank 8 on layers of Qwen2.5-3B's shape, 4-bit base, 1 × 256"
    " tokens; weights, activations and optimizer states are decided tensor by tensor; seconds per step are estimated for `zen4-2core`."
    " Every budget is planned by a process that knows nothing yet. The fixed rules' steps are in multiples of the plan's; \"torch\" is the"
    " best of what the activation-memory-budget solvers of PyTorch save, with weights unpacked or streamed."
)


def main(
    layers: Annotated[list[int] | None, typer.Option(help="depths to plan at five budgets each")] = None,
    depth: Annotated[list[int] | None, typer.Option(help="depths for the growth of the cost")] = None,
    time_limit: Annotated[float, typer.Option(help="seconds per plan")] = 60.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the figures")] = None,
    *,
    curve: Annotated[
        bool, typer.Option(help="a curve of 12 budgets beside single ones, and budgets near the smallest")
    ] = True,
    limits: Annotated[bool, typer.Option(help="searches cut short by a time limit")] = True,
    over: Annotated[bool, typer.Option(help="the best plan over the seconds of a search")] = True,
    write: Annotated[bool, typer.Option(help="write docs/benchmarks/planner.md")] = False,
) -> None:
    """Plan, measure, compare."""
    report = tables.Report()
    figures: dict[str, Any] = {"budgets": [], "depth": [], "curve": [], "near": [], "limits": []}
    for count in layers if layers is not None else [36, 80]:
        figures["budgets"] += at_budgets(count, time_limit, report)
    if curve:
        count = (layers or [36])[0]
        figures["curve"] = on_a_curve(count, time_limit, report)
        figures["near"] = near_the_smallest(count, time_limit, report)
    if limits:
        figures["limits"] = within_limits((layers or [36])[0], report)
    if over:
        figures["over_time"] = over_time(time_limit, report)
    figures["depth"] = by_depth(depth if depth is not None else [24, 48, 96, 192], time_limit, report)
    figures["peak_bytes"] = peak_bytes()
    report.text(f"peak of this process and of one beside it, tracing included: {format_size(figures['peak_bytes'])}")
    if write:
        report.write("planner", "Planning decoders", NOTES)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


def peak_bytes() -> int:
    """Of this process and the largest beside it, together."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def ends(planner: ModelPlanner) -> tuple[int, int]:
    """(the smallest budget, the peak of keep-all)"""
    return planner.minimum_bytes(time_limit=300.0), planner.plan(1 << 45, policy="keep-all").peak_bytes


def torch_knapsack(problem: LayeredStep) -> list[tuple[float, int, tuple[Column, ...]]]:
    """(seconds of computation, bytes, columns) of what PyTorch's solvers save, over their budgets."""
    from torch._functorch._activation_checkpointing.knapsack import dp_knapsack, greedy_knapsack

    found: dict[tuple[Column, ...], tuple[float, int]] = {}
    for rule in (checkpoint_layers, mebp):
        base = rule_columns(problem, rule)
        for step in range(21):
            for solver in (dp_knapsack, greedy_knapsack):
                made: dict[tuple[int, Decision], Column] = {}
                columns = []
                for kind, column in zip(problem.layer_type, base):
                    key = kind, column.decision
                    if key not in made:
                        made[key] = _saved(problem, kind, column, solver, step / 20)
                    columns.append(made[key])
                computing = sum(column.core_seconds for column in columns)
                found[tuple(columns)] = computing, charged_bytes(problem, tuple(columns))
    return sorted(((*figures, columns) for columns, figures in found.items()), key=lambda point: point[:2])


def _saved(problem: LayeredStep, kind: int, column: Column, solver: Any, share: float) -> Column:
    """The column with what the solver saves of its layer kept as well; equal layers save the same."""
    layer, decision = problem.types[kind], column.decision
    operators = {value: op for op in layer.forward for value in op.outputs}
    items = [v for v in layer.candidates if v in operators and v not in decision.keep and layer.bytes[v]]
    whole = sum(layer.bytes[value] for value in items)
    if not items:
        return column
    sizes, times = [layer.bytes[value] / whole for value in items], [operators[value].seconds for value in items]
    _, saved, _ = solver(sizes, times, share)
    keep = decision.keep | {items[index] for index in saved}
    return measure(
        layer, Decision(keep=keep, offload=decision.offload, weights=decision.weights, states=decision.states)
    )


def fastest_saved(
    planner: ModelPlanner, points: list[tuple[float, int, tuple[Column, ...]]], budget: int
) -> float | None:
    """Seconds of the fastest of them that fits, carried out and clocked as every plan is."""
    room = planner.solver.room(budget)
    best: float | None = None
    for computing, size, columns in points:
        if size > room or (best is not None and computing >= best):
            continue
        schedule, _ = realize(planner.problem, columns, room)
        if schedule is not None:
            best = schedule.seconds if best is None else min(best, schedule.seconds)
    return best


def at_budgets(layers: int, time_limit: float, report: tables.Report) -> list[dict[str, Any]]:
    """Five budgets, each by a planner that knows nothing yet, beside the fixed rules at the same budget."""
    profile = decoder_profile(layers)
    smallest, largest = ends(ModelPlanner(profile))
    names = [*POLICIES, "torch"]
    table = Table(
        "budget", "CPU s", "step s", "gap", "to any", "status", *names, title=f"{layers} layers, each budget alone"
    )
    points = torch_knapsack(ModelPlanner(profile).problem)
    rows = []
    for share in SHARES:
        budget = int(smallest + share * (largest - smallest))
        begun = time.process_time()
        planner = ModelPlanner(profile)
        made = planner.plan(budget, time_limit=time_limit)
        seconds = time.process_time() - begun
        rules = {name: planner.plan(budget, policy=name) for name in POLICIES}
        slower = {n: p.step_seconds / made.step_seconds if p.train is not None else None for n, p in rules.items()}
        saved = fastest_saved(planner, points, budget)
        slower["torch"] = None if saved is None else saved / made.step_seconds
        if any(ratio is not None and ratio < 1 - 1e-9 for ratio in slower.values()):
            report.text(f"{layers} layers at {format_size(budget)}: slower than a fixed rule: {slower}")
        rows.append(
            {
                "layers": layers,
                "budget_bytes": budget,
                "cpu_seconds": seconds,
                "step_seconds": made.step_seconds,
                "gap": made.gap,
                "any_schedule_gap": made.any_schedule_gap,
                "status": made.status,
                "deterministic": made.deterministic,
                "times_slower": slower,
            }
        )
        told = ["does not fit" if ratio is None else f"{ratio:.2f} ×" for ratio in slower.values()]
        table.add_row(
            f"{budget / MIB:.0f} MiB",
            f"{seconds:.1f}",
            f"{made.step_seconds:.3f}",
            f"{made.gap:.2%}",
            f"{made.any_schedule_gap:.2%}",
            made.status,
            *told,
        )
    report.table(table)
    return rows


def on_a_curve(layers: int, time_limit: float, report: tables.Report) -> list[dict[str, Any]]:
    """Twelve budgets by one comparison, whose processes reuse what they have found, beside each by a planner that knows
    nothing yet; by the clock on the wall.
    """
    profile = decoder_profile(layers)
    smallest, largest = ends(ModelPlanner(profile))
    budgets = [int(smallest + share * (largest - smallest)) for share in CURVE]
    cpu, begun = _cpu_seconds(), time.monotonic()
    told = compare(profile, budgets, ["solver"], time_limit=time_limit)
    together, cpu = time.monotonic() - begun, _cpu_seconds() - cpu
    table = Table("budget", "s", "alone, s", "step s", "gap", title=f"{layers} layers, one curve")
    rows = []
    for made in reversed(told.plans):
        begun = time.monotonic()
        ModelPlanner(profile).plan(made.budget_bytes, time_limit=time_limit)
        alone = time.monotonic() - begun
        rows.append(
            {
                "budget_bytes": made.budget_bytes,
                "seconds": made.solve_seconds,
                "alone_seconds": alone,
                "step_seconds": made.step_seconds,
                "gap": made.gap,
            }
        )
        table.add_row(
            f"{made.budget_bytes / MIB:.0f} MiB",
            f"{made.solve_seconds:.1f}",
            f"{alone:.1f}",
            f"{made.step_seconds:.3f}",
            f"{made.gap:.2%}",
        )
    alone, median = sum(r["alone_seconds"] for r in rows), statistics.median(r["alone_seconds"] for r in rows)
    table.add_row("together", f"{together:.1f}", f"{alone:.1f}")
    report.table(table)
    report.text(
        f"the curve takes {together / median:.1f} × the median of its budgets alone, {median:.1f} s, and {cpu:.1f} CPU seconds"
    )
    return rows


def _cpu_seconds() -> float:
    """Of this process and those it has ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def near_the_smallest(layers: int, time_limit: float, report: tables.Report) -> list[dict[str, Any]]:
    """Budgets little above the smallest, each by a planner that knows nothing yet, and all by one that comes down to
    them from roomier ones.
    """
    profile = decoder_profile(layers)
    smallest, _ = ends(ModelPlanner(profile))
    one = ModelPlanner(profile)
    for share in ROOMIER:
        one.plan(int(share * smallest), time_limit=time_limit)
    table = Table(
        "of the smallest",
        "budget",
        "alone, CPU s",
        "gap",
        "coming down, CPU s",
        "gap",
        title=f"{layers} layers, near the smallest",
    )
    rows = []
    for share in reversed(NEAR):
        budget = int(share * smallest)
        alone, alone_seconds = _timed(ModelPlanner(profile), budget, time_limit)
        made, seconds = _timed(one, budget, time_limit)
        rows.append(
            {
                "share": share,
                "budget_bytes": budget,
                "alone_seconds": alone_seconds,
                "alone_gap": alone.gap,
                "cpu_seconds": seconds,
                "gap": made.gap,
            }
        )
        table.add_row(
            f"{share:.2f}",
            f"{budget / MIB:.0f} MiB",
            f"{alone_seconds:.1f}",
            f"{alone.gap:.2%}",
            f"{seconds:.1f}",
            f"{made.gap:.2%}",
        )
    report.table(table)
    return rows


def _timed(planner: ModelPlanner, budget: int, time_limit: float) -> tuple[Plan, float]:
    """A plan, and the CPU seconds that it took."""
    begun = time.process_time()
    made = planner.plan(budget, time_limit=time_limit)
    return made, time.process_time() - begun


def within_limits(layers: int, report: tables.Report) -> list[dict[str, Any]]:
    """Wall clock of searches that a limit ends, at a tenth of the way from the smallest budget to keep-all."""
    profile = decoder_profile(layers)
    rules = ModelPlanner(profile)
    smallest = rules.plan(1 << 45, policy="mebp").peak_bytes
    largest = rules.plan(1 << 45, policy="keep-all").peak_bytes
    budget = int(smallest + 0.1 * (largest - smallest))
    table = Table("limit s", "took s", "step s", "gap", "status", title=f"{layers} layers, cut short")
    rows = []
    for limit in LIMITS:
        planner = ModelPlanner(profile)
        begun = time.monotonic()
        made = planner.plan(budget, time_limit=limit)
        took = time.monotonic() - begun
        rows.append({"limit_seconds": limit, "wall_seconds": took, "gap": made.gap, "status": made.status})
        table.add_row(f"{limit:g}", f"{took:.2f}", f"{made.step_seconds:.3f}", f"{made.gap:.2%}", made.status)
    report.table(table)
    return rows


def searches() -> Iterator[tuple[str, str, Callable[[float, SearchProgress], Plan | FleetPlan]]]:
    """What is searched over time: a name, the budget, and the search of a planner that knows nothing yet."""
    for name, (layers, seq, config, budgets) in OVER_TIME.items():
        profile = decoder_profile(layers, seq=seq, **config)
        for budget in budgets:

            def of_model(limit: float, note: SearchProgress, profile: Profile = profile, budget: int = budget) -> Plan:
                return ModelPlanner(profile).plan(budget * MIB, time_limit=limit, progress=note)

            yield name, f"{budget} MiB", of_model
    for count, training, share in GRAPHS_OVER_TIME:
        graph = graph_profile(layered(count, training=training))
        budget = int(share * GraphPlanner(graph).keep_all_bytes)

        def of_graph(limit: float, note: SearchProgress, profile: Profile = graph, budget: int = budget) -> Plan:
            return GraphPlanner(profile).plan(budget, time_limit=limit, progress=note)

        yield f"graph of {count}{', training' if training else ''}", f"{share:.0%}", of_graph
    for name in FLEETS_OVER_TIME:
        layers, seq, config, _ = OVER_TIME[name]
        profile = decoder_profile(layers, seq=seq, **config)
        members = [
            MemberSpec(
                name=device,
                profile=estimate_profile(profile, find_device(device)),
                budget_bytes=budget * MIB,
                link=LINK,
            )
            for device, budget in FLEET.items()
        ]
        described = DescribedFleet(members=members, of_rounds=False, count=16)
        for kind in ("data", "pipeline"):

            def of_fleet(
                limit: float, note: SearchProgress, described: DescribedFleet = described, kind: str = kind
            ) -> FleetPlan:
                return plan_fleet(described, kind=kind, time_limit=limit, progress=note)[0]

            yield f"four devices, {name}", kind, of_fleet


def over_time(time_limit: float, report: tables.Report) -> list[dict[str, Any]]:
    """When searches that know nothing yet have their first plan, and one near their last bound, by the clock on the
    wall; and the primal integral: the mean gap of the best plan to that bound, times the seconds until the end, where a
    search without a plan is at a gap of 1 (Berthold 2013).
    """
    table = Table(
        "searched",
        "budget",
        "first plan, s",
        *(f"within {gap:.1%}, s" for gap in WITHIN),
        "end, s",
        "gap",
        "integral, s",
    )
    rows = []
    for name, budget, search in searches():
        told: list[dict[str, Any]] = []
        begun = time.monotonic()

        def note(state: dict[str, Any], told: list[dict[str, Any]] = told, begun: float = begun) -> None:
            if state["stage"] in CARRIED_OUT and state["incumbent"] < math.inf:
                told.append(state | {"seconds": time.monotonic() - begun})

        made = search(time_limit, note)
        end = time.monotonic() - begun
        found = [(state["seconds"], state["incumbent"]) for state in told]
        near = [
            next((at for at, seconds in found if seconds - made.bound_seconds <= gap * seconds), None) for gap in WITHIN
        ]
        integral = primal_integral(found, made.bound_seconds, end)
        rows.append(
            {"searched": name, "budget": budget, "found": found, "near": near, "end": end, "gap": made.gap}
            | {"bound": made.bound_seconds, "integral": integral}
        )
        first = found[0][0] if found else None
        cells = ["–" if at is None else f"{at:.1f}" for at in (first, *near)]
        table.add_row(name, budget, *cells, f"{end:.1f}", f"{made.gap:.2%}", f"{integral:.2f}")
    report.table(table)
    return rows


def primal_integral(found: list[tuple[float, float]], bound: float, end: float) -> float:
    """Of schedules found at so many seconds, each with the seconds of its step, until `end`."""
    area, since, best = 0.0, 0.0, float("inf")
    for at, seconds in [*found, (end, float("inf"))]:
        area += (at - since) * (1.0 if best == float("inf") else (best - bound) / best)
        since, best = at, min(best, seconds)
    return area


def by_depth(depths: list[int], time_limit: float, report: tables.Report) -> list[dict[str, Any]]:
    """Equal layers, more and more of them, at 1.5 times the smallest rule's peak."""
    table = Table("layers", "CPU s", "programs priced", "columns", "gap", title="equal layers")
    rows = []
    for count in depths:
        planner = ModelPlanner(decoder_profile(count))
        budget = int(planner.plan(1 << 45, policy="mebp").peak_bytes * 1.5)
        begun = time.process_time()
        made = planner.plan(budget, time_limit=time_limit)
        seconds = time.process_time() - begun
        pool = planner.solver.pool
        columns = sum(map(len, pool.columns))
        rows.append(
            {"layers": count, "cpu_seconds": seconds, "programs": pool.programs, "columns": columns, "gap": made.gap}
        )
        table.add_row(str(count), f"{seconds:.1f}", str(pool.programs), str(columns), f"{made.gap:.2%}")
    report.table(table)
    return rows


if __name__ == "__main__":
    typer.run(main)
