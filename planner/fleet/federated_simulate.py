"""The judge of federated plans: recounts a round from the plans of its members, and checks what is stated.

Every violated invariant raises `InvalidFleet` with the invariant's name and the member: names, steps (they add up, in
whole updates), link, plan (the one with the stated fingerprint), optimizer, model, budget, peak (the plan's replay and
Flower's processes), seconds, makespan, bound.
"""

from __future__ import annotations

from collections.abc import Mapping

from tightfit.planner.fleet.federated_schema import FederatedMember, FederatedPlan
from tightfit.planner.fleet.pieces import trained_tensors
from tightfit.planner.fleet.round_times import transfer_seconds
from tightfit.planner.fleet.simulate import ROUNDING, InvalidFleet, check_link, same
from tightfit.planner.fleet.split_schema import SplitPlan
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import Simulation, simulate


def simulate_federated(fleet: FederatedPlan, plans: Mapping[str, Plan]) -> float:
    """Seconds of a round of `fleet` with the plans of its members, by name. Raises InvalidFleet where an invariant breaks."""
    check_members(fleet)
    distinct = {id(plan): plan for plan in plans.values()}  # many may have one
    found = {key: simulate(plan) for key, plan in distinct.items()}
    for member in fleet.members:
        plan = plans.get(member.name)
        _check(fleet, member, plan, found.get(id(plan)))
    makespan = max(member.round_seconds for member in fleet.members)
    check_makespan(fleet, makespan)
    return makespan


def check_members(fleet: FederatedPlan | SplitPlan) -> None:
    """Members have names of their own and take the steps of the round together. Raises InvalidFleet otherwise."""
    names = [member.name for member in fleet.members]
    if len(set(names)) < len(names):
        raise InvalidFleet("names", "the fleet", "two members have the same name")
    if sum(member.steps for member in fleet.members) != fleet.steps:
        raise InvalidFleet("steps", "the fleet", f"its members do not take {fleet.steps} steps in all")


def check_makespan(fleet: FederatedPlan | SplitPlan, makespan: float) -> None:
    """The makespan that is stated is the one that was counted, and the bound is none above it. Raises InvalidFleet otherwise."""
    if not same_seconds(fleet.makespan_seconds, makespan):
        raise InvalidFleet("makespan", "the fleet", f"{fleet.makespan_seconds} s are stated, members take {makespan} s")
    if not 0 <= fleet.bound_seconds <= makespan * (1 + ROUNDING):
        raise InvalidFleet(
            "bound", "the fleet", f"{fleet.bound_seconds} s are said to be a lower bound, a round takes {makespan} s"
        )


def _check(fleet: FederatedPlan, member: FederatedMember, plan: Plan | None, found: Simulation | None) -> None:
    def fail(invariant: str, text: str) -> InvalidFleet:
        return InvalidFleet(invariant, member.name, text)

    link = member.link
    check_link(member.name, link)
    if member.steps % fleet.accumulate:
        raise fail("steps", f"it takes {member.steps} steps, and an update takes {fleet.accumulate}")
    if not member.steps:
        if plan is not None or member.plan is not None or member.round_seconds:
            raise fail("plan", "it takes no steps and has a plan")
        return
    if plan is None or found is None or member.plan is None or plan.fingerprint != member.plan_fingerprint:
        raise fail("plan", "it takes steps, and its plan is missing or another one")
    if plan.accumulate != fleet.accumulate or plan.optimizer.get("name", "adamw") != "adamw":
        raise fail("optimizer", f"its plan is for {plan.optimizer}")
    own = sum(tensor.bytes for tensor in trained_tensors(plan))
    lora = plan.model.lora
    if lora is None or (plan.model.name, plan.batch, own) != (fleet.model, fleet.batch, member.adapter_bytes):
        raise fail("model", f"its plan trains {own} bytes of {plan.model.name} in batches of {plan.batch}")
    if lora["rank"] != member.rank or member.rank > fleet.rank or own > fleet.adapter_bytes:
        raise fail("model", f"its adapter has rank {lora['rank']}, the fleet's {fleet.rank}")
    if member.peak_bytes != found.peak_bytes + member.flower_bytes or plan.peak_bytes != found.peak_bytes:
        raise fail("peak", f"{member.peak_bytes} bytes are stated, the replay of its plan holds {found.peak_bytes}")
    if member.flower_bytes < 0 or member.peak_bytes > member.budget_bytes:
        raise fail("budget", f"it peaks at {member.peak_bytes} bytes and may take {member.budget_bytes}")
    step = member.step_seconds
    if step is None or not same_seconds(step, found.step_seconds) or member.start_seconds < 0:
        raise fail("seconds", f"{step} s are stated for a step, the replay takes {found.step_seconds} s")
    if member.bound_seconds is None or not 0 <= member.bound_seconds <= step * (1 + ROUNDING):
        raise fail("bound", f"{member.bound_seconds} s are said to be a lower bound, a step takes {step} s")
    moved = transfer_seconds(link, fleet.adapter_bytes, own)
    seconds = moved + member.start_seconds + member.steps * step
    if not same_seconds(member.round_seconds, seconds):
        raise fail("seconds", f"{member.round_seconds} s are stated for a round, the count is {seconds} s")


def same_seconds(one: float, other: float) -> bool:
    """Whether two times are the same but for rounding."""
    return same(one, other, max(abs(one), abs(other), 1e-9))
