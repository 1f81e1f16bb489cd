"""Plans that must stay as they are while code is moved: ``golden.py write FILE`` plans the corpus, ``golden.py compare
OLD NEW`` says what differs.

    python tests/benchmarks/golden.py write before.json [--only NAME,...]
    python tests/benchmarks/golden.py compare before.json after.json [--step 0.0005] [--gap 0.0005]

The corpus: five published models, estimated for ``zen5-2core``, at four budgets each; the demo's model at four; the
same on a board with a slow card, at two; five models near their smallest budgets, at four; three modules at three; ten
bare graphs at three; small graphs, chains and graphs with a disk at two; searches that a short time limit ends. A plan
whose search the clock ended may differ from one run to the next: it is compared within the tolerances only. All others
are compared to the digit, unless tolerances are given. Planning seconds are summed, and compared as a ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "benchmarks")]

from graphs import GRAPHS
from layered_graph import layered

from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.schedule import peak_bytes
from tightfit.planner.plan import planner_of
from tightfit.planner.search_options import ALL, SearchOptions
from tightfit.profiles.api import profile
from tightfit.profiles.graph_input import BareChannel, BareGraph, BareOperator, graph_profile
from tightfit.profiles.schema import Channel, Profile

MIB = 1 << 20
DEVICE = "zen5-2core"
CAPS = {"qwen2.5-0.5b": 320, "gemma3-1b": 569, "qwen2.5-1.5b": 460, "qwen2.5-3b": 662, "gemma3-4b": 900}
"""MiB: what MeBP reports for a phone"""
TIMES = (1.0, 1.25, 2.0, 4.0)
"""budgets of a published model, in caps"""
SMOL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
"""the demo's model"""
SMOL_BUDGETS = (200, 350, 500, 950)
"""MiB"""
MODULES = ("examples.vision:residual_cnn", "examples.vision:vision_transformer", "examples.own_module:text_classifier")
MODULE_SHARES = (0.05, 0.3, 0.7)
"""of the way from the smallest budget to the one in which everything is kept"""
GRAPH_SHARES = (0.8, 0.6, 0.4)
"""of keep-all's peak"""
NEARLY = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "gemma3-1b", "qwen2.5-3b")
NEAR_SHARES = (1.02, 1.05, 1.1, 1.3)
"""models planned at so many times their smallest budget"""
SLOW = Channel(bytes_per_second=20e6, latency_seconds=1e-3)
"""an SD card that writes 20 MB/s"""
GRAPH_DISK = BareChannel(bytes_per_second=3e9, latency_seconds=1e-4)
"""an NVMe disk"""
SMALL = {"small": 18, "small with a disk": 8}
"""graphs for the exact solvers, and how many operators each has"""
CHAIN = 64
"""layers of a chain of equal costs"""
SHORT = (("qwen2.5-3b", 0.5), ("qwen2.5-3b", 3.0), ("layered training 400", 5.0))
"""seconds that a search is given which then ends by the clock"""
MODEL_LIMIT, GRAPH_LIMIT, DISK_LIMIT = 300.0, 60.0, 15.0
"""seconds: generous, so that the clock ends as few searches as possible; less where it always does"""
FIGURES = (
    "status",
    "step_seconds",
    "peak_bytes",
    "bound_seconds",
    "any_schedule_bound_seconds",
    "minimum_budget_bytes",
)


def cases(only: set[str]) -> Iterator[tuple[str, Profile, list[int], float]]:
    """(name, profile, budgets in bytes, time limit) of every model and graph of the corpus."""

    def wanted(name: str) -> bool:
        return not only or name in only

    for name, cap in CAPS.items():
        if wanted(name):
            source = ROOT / "examples" / "models" / name / "config.json"
            yield name, profile(str(source), device=DEVICE), [int(t * cap * MIB) for t in TIMES], MODEL_LIMIT
    if wanted("smollm2-135m"):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "config.json"
            source.write_text(json.dumps(SMOL))
            made = profile(str(source), batch=16, seq=64, device=DEVICE)
        yield "smollm2-135m", made, [size * MIB for size in SMOL_BUDGETS], MODEL_LIMIT
    for factory in MODULES:
        if wanted(factory):
            made = profile(factory, device=DEVICE)
            planner = planner_of(made)
            low = planner.plan(1, time_limit=MODEL_LIMIT).minimum_budget_bytes
            high = planner.plan(1, policy="keep-all", time_limit=MODEL_LIMIT).minimum_budget_bytes
            assert low
            assert high
            yield factory, made, [int(low + share * (high - low)) for share in MODULE_SHARES], MODEL_LIMIT
    for name in GRAPHS:
        if wanted(name):
            yield bare(name, GRAPHS[name](), GRAPH_SHARES)
    for name, operators in SMALL.items():
        for seed in range(6):
            if wanted(f"{name} {seed}"):
                made = layered(operators, seed=seed, training=True)
                yield bare(f"{name} {seed}", with_disk(made) if "disk" in name else made, (0.9, 0.8))
    for name in ("VGG-16", "ResNet-50", "layered training 100"):
        if wanted(f"{name} with a disk"):
            yield bare(f"{name} with a disk", with_disk(GRAPHS[name]()), (0.6, 0.4), DISK_LIMIT)
    if wanted("chain"):
        yield bare("chain", equal_chain(CHAIN), (0.2, 0.1), DISK_LIMIT)
    if wanted("smollm2-135m on a slow card"):
        made = next(iter(cases({"smollm2-135m"})))[1]
        slow = made.model_copy(update={"device": made.device.model_copy(update={"read": SLOW, "write": SLOW})})
        yield "smollm2-135m on a slow card", slow, [400 * MIB, 600 * MIB], MODEL_LIMIT
    for name in NEARLY:
        if wanted(f"{name} near the smallest"):
            made = next(iter(cases({name})))[1]
            least = planner_of(made).minimum_bytes(time_limit=MODEL_LIMIT)
            yield f"{name} near the smallest", made, [int(share * least) for share in NEAR_SHARES], MODEL_LIMIT
    for name, limit in SHORT:
        if wanted(f"{name} within {limit:g} s"):
            made, budgets = next(iter(cases({name})))[1:3]
            yield f"{name} within {limit:g} s", made, budgets[1:3], limit


def bare(
    name: str, graph: BareGraph, shares: tuple[float, ...], limit: float = GRAPH_LIMIT
) -> tuple[str, Profile, list[int], float]:
    """The case of a bare graph at shares of keep-all's peak."""
    made = graph_profile(graph)
    top = peak_bytes(dag_of(made), ())
    return name, made, [int(share * top) for share in shares], limit


def with_disk(graph: BareGraph) -> BareGraph:
    """The graph with a disk to move outputs to."""
    return graph.model_copy(update={"read": GRAPH_DISK, "write": GRAPH_DISK})


def equal_chain(count: int) -> BareGraph:
    """A forward of `count` operators in a row, each of a second and a MiB, and its backward."""
    made = [
        BareOperator(name=f"f{i}", seconds=1.0, output_bytes=MIB, inputs=[f"f{i - 1}"] if i else [], phase="forward")
        for i in range(count)
    ]
    for i in reversed(range(count)):
        sources = [f"f{i}", *([f"b{i + 1}"] if i + 1 < count else [])]
        made.append(BareOperator(name=f"b{i}", seconds=2.0, output_bytes=MIB, inputs=sources, phase="backward"))
    return BareGraph(format="tightfit-graph", name="chain", estimated=True, operators=made)


def planned(only: set[str]) -> Iterator[dict[str, Any]]:
    """One row for every model or graph and budget."""
    for name, made, budgets, limit in cases(only):
        for budget in budgets:
            yield row_of(name, made, budget, limit)


def row_of(name: str, made: Profile, budget: int, limit: float, options: SearchOptions = ALL) -> dict[str, Any]:
    """What a planner that has seen nothing answers: it then depends on this budget alone."""
    planner, started, worked = planner_of(made, options), time.monotonic(), time.process_time()
    plan = planner.plan(budget, time_limit=limit)
    row = {"name": name, "profile": made.fingerprint, "budget_bytes": budget, "deterministic": plan.deterministic}
    row |= {figure: getattr(plan, figure) for figure in FIGURES}
    row |= {"gap": plan.gap, "ended_by": plan.ended_by}
    return row | {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - worked}


def differences(old: dict[str, Any], new: dict[str, Any], step: float, gap: float) -> Iterator[str]:
    """What of a row is not as it was; `step` and `gap` are how much worse, relative and in absolute points, it may
    be.
    """
    exact = not step and not gap and old["deterministic"] and new["deterministic"]
    if exact:
        yield from (f"{figure}: {old[figure]} -> {new[figure]}" for figure in FIGURES if old[figure] != new[figure])
        return
    unfit = [row["minimum_budget_bytes"] is not None for row in (old, new)]
    if unfit[0] != unfit[1]:
        yield f"status: {old['status']} -> {new['status']}"
    elif unfit[0]:
        if new["minimum_budget_bytes"] > old["minimum_budget_bytes"] * (1 + (step or 5e-4)):
            yield f"minimum_budget_bytes: {old['minimum_budget_bytes']} -> {new['minimum_budget_bytes']}"
    else:
        if new["step_seconds"] > old["step_seconds"] * (1 + (step or 5e-4)):
            yield f"step_seconds: {old['step_seconds']} -> {new['step_seconds']}"
        if new["gap"] > old["gap"] + (gap or 5e-4):
            yield f"gap: {old['gap']:.5f} -> {new['gap']:.5f}"


def compare(old_path: Path, new_path: Path, step: float, gap: float) -> int:
    """Print what differs; the number of rows that do."""
    old, new = (
        {(row["name"], row["budget_bytes"]): row for row in json.loads(path.read_text())}
        for path in (old_path, new_path)
    )
    wrong = 0
    for key in old.keys() | new.keys():
        if key not in old or key not in new:
            print(f"{key[0]} at {key[1]} bytes: only in {old_path if key in old else new_path}")
            wrong += 1
            continue
        found = list(differences(old[key], new[key], step, gap))
        wrong += bool(found)
        for line in found:
            print(f"{key[0]} at {key[1]} bytes: {line}")
    both = old.keys() & new.keys()
    clock = sum(not (old[key]["deterministic"] and new[key]["deterministic"]) for key in both)
    before, after = (sum(rows[key]["seconds"] for key in both) for rows in (old, new))
    print(
        f"{len(both)} plans, {wrong} differ; the clock ended {clock}; planning {before:.0f} s -> {after:.0f} s ({after / before:.3f} x)"
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("file", type=Path)
    write.add_argument("--only", type=lambda text: set(text.split(",")), default=set())
    both = commands.add_parser("compare")
    both.add_argument("old", type=Path)
    both.add_argument("new", type=Path)
    both.add_argument("--step", type=float, default=0.0, help="how much longer a step may be, relative")
    both.add_argument("--gap", type=float, default=0.0, help="how much wider a gap may be")
    given = parser.parse_args()
    if given.command == "compare":
        return 1 if compare(given.old, given.new, given.step, given.gap) else 0
    rows = []
    for row in planned(given.only):
        rows.append(row)
        print(
            f"{row['name']} at {row['budget_bytes'] / MIB:,.1f} MiB: {row['status']}, {row['step_seconds']} s, {row['ended_by']}, {row['seconds']:.1f} s",
            flush=True,
        )
        given.file.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
