"""Writes a graph planner's answer as a plan: the schedule replayed by the simulator, or the smallest budget and what
sets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.graphs.bounds.bound import AnyBound
from tightfit.planner.graphs.problem.actions import Action, Carried, instructions
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.plan_result import answered, drafted, drafted_phase, too_small
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.graph_input import FIXED
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.units import format_size

Report = Callable[[str, float, float], None]
"""told of a search, whenever it has come further: (its stage, seconds of the best schedule, lower bound in seconds)"""


@dataclass(frozen=True, kw_only=True)
class GraphOutcome:
    """Result of the search at one budget."""

    carried: Carried | None
    """the schedule; None: none was found that fits"""
    bound_seconds: float
    """lower bound on the seconds of every schedule of the class"""
    deterministic: bool = True
    """whether no time limit cut any search that it depends on"""
    stalled: bool = False
    """whether the search for a proof of optimality was given up, since it made too little progress"""


@dataclass(frozen=True, kw_only=True)
class LowestPeak:
    """The schedule with the lowest peak found: that peak is the smallest budget."""

    carried: Carried
    lowest_bytes: int
    """of a rule its own peak; of the solver a lower bound on the peak of schedules with first runs and re-runs in this
    order
    """
    deterministic: bool = True
    """as of `GraphOutcome`"""


def infeasible(
    profile: Profile,
    dag: Dag,
    budget: int,
    policy: str,
    least: LowestPeak,
    any_bound: AnyBound,
    cutoff: Cutoff,
    *,
    deterministic: bool,
) -> Plan:
    """The answer where no schedule was found that fits `budget`: it states the smallest plan's peak, and why it is not
    lower.

    `deterministic`: whether no time limit cut the search.
    """
    told = _assembled(profile, dag, least.carried.peak_bytes, policy, least.carried)
    simulation = simulate(told)
    peak = simulation.train.peak
    largest = ", ".join(list(peak.tensors)[:3])
    known = _known(budget, policy, least, nothing=any_bound.seconds == float("inf"), floor=dag.floor_bytes)
    reason = f"the smallest plan peaks at {peak.text} with {largest} live ({known}); a smaller batch lowers it"
    return too_small(
        told,
        budget,
        minimum_bytes=simulation.peak_bytes,
        bound_bytes=max(least.lowest_bytes, dag.floor_bytes, budget + 1 if any_bound.seconds == float("inf") else 0),
        reason=reason,
        any_bound=any_bound.seconds,
        solve_seconds=cutoff.elapsed,
        deterministic=deterministic and least.deterministic,
    )


def _known(budget: int, policy: str, least: LowestPeak, *, nothing: bool, floor: int) -> str:
    """In words, what is known about peaks below the smallest plan's. `nothing`: it is proven that no schedule at all
    fits the budget.
    """
    if policy != "solver":
        return "no lower peak under this rule"
    if least.carried.peak_bytes <= floor:
        return "no schedule has a lower peak"
    if least.carried.peak_bytes <= least.lowest_bytes:
        return "no schedule with first runs and re-runs in this order has a lower peak"
    found = "the smallest found" if least.deterministic else "the smallest found before the time limit"
    if nothing:
        return f"{found}; surely no schedule fits {format_size(budget)}"
    if least.lowest_bytes > budget:
        return f"{found}; surely no schedule with first runs and re-runs in this order fits {format_size(budget)}"
    return found


def finished(
    profile: Profile,
    dag: Dag,
    budget: int,
    policy: str,
    outcome: GraphOutcome,
    any_bound: AnyBound,
    cutoff: Cutoff,
    *,
    asked: float = 0.0,
    interrupted: bool = False,
) -> Plan:
    """The plan of a schedule; `asked` and `interrupted` as of `tightfit.planner.plan_result.ended_by`."""
    assert outcome.carried is not None
    raw = _assembled(profile, dag, budget, policy, outcome.carried)
    simulation = simulate(raw)
    return answered(
        # Bare graphs have no arena offsets: the arena's size is the most bytes live at once.
        raw.model_copy(update={"arena_bytes": simulation.arena_bytes}),
        simulation,
        bound_seconds=max(outcome.bound_seconds, any_bound.seconds),
        any_bound=any_bound.seconds,
        solve_seconds=cutoff.elapsed,
        deterministic=outcome.deterministic,
        asked=asked,
        stalled=outcome.stalled,
        interrupted=interrupted,
    )


def _assembled(profile: Profile, dag: Dag, budget: int, policy: str, carried: Carried) -> Plan:
    """The plan with its schedule, before the simulator's figures are entered."""
    return drafted(
        profile,
        profile,
        policy=policy,
        budget_bytes=budget,
        decisions=_decisions(dag, carried.actions),
        resident={FIXED: 0} if dag.fixed_bytes else {},
        train=[drafted_phase(instructions(dag, carried.actions))],
    )


def _decisions(dag: Dag, actions: Iterable[Action]) -> dict[str, str]:
    """Output -> ``offloaded``, ``recomputed`` (at least once) or ``kept``; outputs read by the very next run only are
    left out.
    """
    ran: dict[int, int] = {}
    last: dict[int, int] = {}
    decided: dict[int, str] = {}
    clock = 0
    for verb, i in actions:
        if verb == "fetch":
            decided.setdefault(i, "offloaded")
        if verb != "run":
            continue
        clock += 1
        if i in ran:
            decided[i] = "recomputed"
        ran.setdefault(i, clock)
        for source in dag.inputs[i]:
            last[source] = clock
    decisions = {}
    for i in range(dag.operators):
        if i in decided:
            decisions[dag.names[i]] = decided[i]
        elif last.get(i, 0) > ran[i] + 1:
            decisions[dag.names[i]] = "kept"
    return decisions
