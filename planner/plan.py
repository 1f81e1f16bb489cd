"""The planner's entry points: plan a profile at a budget, find the smallest budget, list the policies.

The answer is a `Plan` even where nothing fits (status infeasible) or nothing was found (unknown). A `Planner` keeps
what budgets share (layer types, columns, bounds), so that many budgets cost little more than one. Every plan is
replayed by `simulate` before it is returned; its figures are the simulator's.
"""

from __future__ import annotations

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.protocol import Planner
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import ALL, TIME_LIMIT, PlanOptions, SearchOptions
from tightfit.planner.solve.policies import POLICIES
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.schema import Profile


@keywords_of(PlanOptions)
def plan(profile: Profile, budget_bytes: int, options: PlanOptions) -> Plan:
    """The fastest step found whose peak stays within `budget_bytes` (all processes of the run), with its proof.

    `policy` names a fixed rule to use instead of the solver. The search ends once the plan's gap, (step - bound) /
    step, is proven to be at most `gap`; with 0 it goes on until the plan is proven optimal, it has stopped gaining, or
    `time_limit` seconds are over. `optimizer` is adamw (None), adam, sgd, momentum, lion or adafactor, whose states and
    updates the plan has. `max_grad_norm` scales the gradients of an update down, all of them together, to at most this
    norm, as `torch.nn.utils.clip_grad_norm_` does; None: not at all. For a budget that is proven too small the plan has
    status infeasible, for one at which no plan was found unknown; both state the smallest budget found, what sets it,
    and what is proven of it. Without a `time_limit` it is `TIME_LIMIT`, and a search that has neither a plan nor that
    proof by then goes on. `progress` is called with stage, incumbent, bound, gap and seconds. Raises InputError for a
    profile, a policy or a number that cannot be used.
    """
    adjusted = chosen(profile, options.optimizer, options.max_grad_norm)
    return planner_of(adjusted).plan(
        budget_bytes, policy=options.policy, time_limit=options.time_limit, gap=options.gap, progress=options.progress
    )


def minimum_budget(
    profile: Profile,
    *,
    policy: str | None = None,
    time_limit: float = TIME_LIMIT,
    optimizer: str | None = None,
    max_grad_norm: float | None = None,
) -> int:
    """The smallest budget, in bytes, for which `plan` finds a plan with these options. Raises InputError as `plan`."""
    adjusted = chosen(profile, optimizer, max_grad_norm)
    return planner_of(adjusted).minimum_bytes(policy=policy, time_limit=time_limit)


def planner_of(profile: Profile, options: SearchOptions = ALL) -> Planner:
    """The planner for this kind of profile; its `plan` may be called for any number of budgets. `options` are for the
    ablation benchmark.
    """
    if profile.model.is_bare_graph:
        from tightfit.planner.graphs.graph_planner import GraphPlanner

        return GraphPlanner(profile, options)
    return ModelPlanner(profile, options)


def policies_of(profile: Profile) -> tuple[str, ...]:
    """Names of the fixed rules that apply to a profile and follow the exact gradient."""
    if not profile.model.is_bare_graph:
        return tuple(POLICIES)
    from tightfit.planner.graphs.problem.dag import dag_of
    from tightfit.planner.graphs.search.baselines import rules_for

    return rules_for(dag_of(profile))
