"""Plan a profile at a budget: the door of the planner. The answer is a `Plan` whatever happens.

`Planner` holds what budgets share (layers, blocks, columns), so that a curve costs little more than a point. Every plan
is replayed by `simulate` before it is returned; its figures are the simulator's.
"""

from __future__ import annotations

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.protocol import Planner
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import (
    Progress,
)
from tightfit.planner.solve.policies import POLICIES
from tightfit.profiles.schema import Profile


def plan(
    profile: Profile,
    budget_bytes: int,
    *,
    policy: str | None = None,
    time_limit: float = 30.0,
    gap: float = 0.0,
    progress: Progress | None = None,
) -> Plan:
    """The fastest step found whose peak stays within `budget_bytes` (all processes of the run), with its proof.

    `policy` names a fixed rule instead of the solver. The search ends once a plan is proven to take at most the share `gap` of its time
    longer than the best of its class; with 0 it goes on to the proof, until it has stopped gaining or `time_limit` seconds are over. A budget
    that cannot hold gives a plan with status infeasible, the smallest budget that can and what sets it. `progress` is called with stage,
    incumbent, bound, gap and seconds. Raises InputError for a profile or policy that cannot be used.
    """
    return planner_of(profile).plan(budget_bytes, policy=policy, time_limit=time_limit, gap=gap, progress=progress)


def minimum_budget(profile: Profile, *, policy: str | None = None, time_limit: float = 30.0) -> int:
    """The smallest budget in bytes for which `plan` has a plan."""
    return planner_of(profile).minimum_bytes(policy=policy, time_limit=time_limit)


def planner_of(profile: Profile) -> Planner:
    """The planner for this kind of profile; its `plan` may be called for any number of budgets."""
    if profile.model.kind == "graph":
        from tightfit.planner.graphs.planner import GraphPlanner

        return GraphPlanner(profile)
    return ModelPlanner(profile)


def policies_of(profile: Profile) -> tuple[str, ...]:
    """Names of the fixed rules that mean something for a profile and follow the exact gradient."""
    if profile.model.kind != "graph":
        return tuple(POLICIES)
    from tightfit.planner.graphs.problem.dag import dag_of
    from tightfit.planner.graphs.search.baselines import rules_for

    return rules_for(dag_of(profile))
