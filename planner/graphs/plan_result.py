"""A graph planner's answer as a plan: the schedule written down and replayed, or the smallest budget and what sets it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tightfit.planner.graphs.bounds.bound import Bound
from tightfit.planner.graphs.problem.actions import Action, Carried, instructions
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.plan_result import answered, drafted, drafted_phase, too_small
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.graph_input import FIXED
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.units import format_size


@dataclass(frozen=True, kw_only=True)
class GraphOutcome:
    """What the search came to."""

    carried: Carried | None
    bound_seconds: float
    timely: bool = True
    """whether no search that it depends on was ended by the clock"""
    stalled: bool = False
    """whether it is the search for a proof alone that was given up before the time limit"""


@dataclass(frozen=True, kw_only=True)
class Least:
    """The smallest budget."""

    carried: Carried
    lowest_bytes: int
    """of a rule its own peak, of the solver what no peak undercuts with first runs and re-runs in this order"""
    timely: bool = True
    """as of `GraphOutcome`"""


def infeasible(
    profile: Profile,
    dag: Dag,
    budget: int,
    policy: str,
    least: Least,
    any_bound: Bound,
    started: float,
    *,
    floor: int,
    timely: bool,
) -> Plan:
    """The answer where nothing was found to fit. `floor`: bytes that no schedule's peak undercuts, whatever its order."""
    told = _assembled(profile, dag, least.carried.peak_bytes, policy, least.carried)
    simulation = simulate(told)
    peak = simulation.train.peak
    largest = ", ".join(list(peak.tensors)[:3])
    known = _known(budget, policy, least, nothing=budget < floor or any_bound.seconds == float("inf"), floor=floor)
    reason = f"the smallest plan peaks at {peak.text} with {largest} live ({known}); a smaller batch lowers it"
    return too_small(
        told,
        budget,
        minimum_bytes=simulation.peak_bytes,
        reason=reason,
        any_bound=any_bound.seconds,
        started=started,
        deterministic=timely and least.timely and any_bound.timely,
    )


def _known(budget: int, policy: str, least: Least, *, nothing: bool, floor: int) -> str:
    """What is known of peaks below the smallest plan's. `nothing`: no schedule at all fits the budget."""
    if policy != "solver":
        return "no lower peak under this rule"
    if least.carried.peak_bytes <= floor:
        return "no schedule has a lower peak"
    if least.carried.peak_bytes <= least.lowest_bytes:
        return "no schedule with first runs and re-runs in this order has a lower peak"
    found = "the smallest found" if least.timely else "the smallest found before the time limit"
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
    any_bound: Bound,
    started: float,
    *,
    asked: float = 0.0,
    interrupted: bool = False,
) -> Plan:
    """The plan of a schedule; `asked` and `interrupted` as of `tightfit.planner.plan_result.ended_by`."""
    assert outcome.carried is not None
    raw = _assembled(profile, dag, budget, policy, outcome.carried)
    simulation = simulate(raw)
    return answered(
        # There are no offsets: the arena is what is live.
        raw.model_copy(update={"arena_bytes": simulation.arena_bytes}),
        simulation,
        bound_seconds=max(outcome.bound_seconds, any_bound.seconds),
        any_bound=any_bound.seconds,
        started=started,
        deterministic=outcome.timely and any_bound.timely,
        asked=asked,
        stalled=outcome.stalled,
        interrupted=interrupted,
    )


def _assembled(profile: Profile, dag: Dag, budget: int, policy: str, carried: Carried) -> Plan:
    """The plan with its schedule, before the simulator has put its figures in."""
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
    """For outputs that outlive the run after their own: kept, offloaded, or recomputed at least once."""
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
