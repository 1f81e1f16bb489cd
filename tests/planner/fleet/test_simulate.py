"""The judge: what a valid fleet takes, and that every broken one is rejected by the invariant that it breaks."""

from __future__ import annotations

import pytest
from fleet_views import changed, computing

from tightfit.planner.fleet.simulate import InvalidFleet, simulate_fleet
from tightfit.planner.plan_result import sealed
from tightfit.planner.simulation.simulate import InvalidSchedule
from tightfit.profiles.schema import EXCHANGE, adamw


def rejected(fleet, plans, invariant, member=None):
    with pytest.raises(InvalidFleet) as caught:
        simulate_fleet(fleet, plans)
    assert caught.value.invariant == invariant, str(caught.value)
    assert f"({invariant})" in str(caught.value)
    assert "plan the fleet again" in str(caught.value)
    if member is not None:
        assert caught.value.member == member


def with_plan(fleet, plans, name, **changes):
    """The same with another plan of a member, whose fingerprint the fleet knows."""
    plan = sealed(plans[name].model_copy(update=changes))
    return changed(fleet, name, plan_fingerprint=plan.fingerprint), {**plans, name: plan}


@pytest.fixture
def first(planned):
    return planned[0].names[0]


@pytest.fixture
def last(planned):
    return planned[0].names[-1]


@pytest.mark.slow
def test_its_figures_are_the_plan_s(planned):
    fleet, plans = planned
    found = simulate_fleet(fleet, plans)
    assert found.makespan_seconds == fleet.makespan_seconds
    assert found.makespan_seconds == pytest.approx(
        found.compute_seconds + found.exchange_seconds + found.update_seconds
    )
    computed = [member.micro_batches * member.micro_batch_seconds for member in computing(fleet)]
    assert found.compute_seconds == pytest.approx(max(computed))


def test_names_are_unique(planned, first, last):
    fleet, plans = planned
    rejected(changed(fleet, last, name=first), plans, "names", first)


def test_those_that_compute_are_members_and_do_so_once(planned, first, last):
    fleet, plans = planned
    idle = fleet.members[0].model_copy(update={"name": "idle"})
    simulate_fleet(fleet.model_copy(update={"members": [idle, *fleet.members]}), plans)
    nobody = [member for member in fleet.members if member.name != last]
    rejected(fleet.model_copy(update={"members": nobody}), plans, "names", last)
    twice = [*fleet.replicas[:-1], fleet.replicas[0]]
    rejected(fleet.model_copy(update={"replicas": twice}), plans, "names", first)


@pytest.mark.parametrize("by", [-1, 1])
def test_micro_batches_follow_one_another(planned, last, by):
    fleet, plans = planned
    rejected(changed(fleet, last, first=computing(fleet)[-1].first + by), plans, "micro-batches", last)


@pytest.mark.parametrize("by", [-1, 1])
def test_micro_batches_are_all_computed(planned, last, by):
    fleet, plans = planned
    rejected(changed(fleet, last, micro_batches=computing(fleet)[-1].micro_batches + by), plans, "micro-batches")


def test_a_fleet_of_nobody(planned):
    fleet, _ = planned
    rejected(fleet.model_copy(update={"members": [], "replicas": []}), {}, "micro-batches")


@pytest.mark.parametrize(
    "broken",
    [
        {"up_bytes_per_second": 0.0},
        {"down_bytes_per_second": -1.0},
        {"latency_seconds": -1e-3},
        {"up_bytes_per_second": float("inf")},
    ],
)
def test_links_carry_something(planned, last, broken):
    fleet, plans = planned
    link = computing(fleet)[-1].link.model_copy(update=broken)
    rejected(changed(fleet, last, link=link), plans, "link", last)


def test_every_member_that_computes_has_its_plan(planned, first, last):
    fleet, plans = planned
    rejected(fleet, {name: plan for name, plan in plans.items() if name != last}, "plan", last)
    rejected(changed(fleet, last, plan="nobody"), plans, "plan", last)
    rejected(changed(fleet, last, plan_fingerprint="0" * 64), plans, "plan", last)
    rejected(fleet, {**plans, last: plans[first]}, "plan", last)


def test_a_member_that_computes_nothing_has_no_plan(planned, first):
    fleet, plans = planned
    rejected(fleet, plans | {"idle": plans[first]}, "plan", "idle")


@pytest.mark.parametrize(
    "optimizer",
    [
        adamw(8),
        {"name": EXCHANGE, "state_tensors": 0, "accumulate": 7},
        {"name": EXCHANGE, "state_tensors": 2, "accumulate": 8},
    ],
)
def test_plans_hand_gradients_over_and_accumulate_the_step(planned, last, optimizer):
    fleet, plans = planned
    rejected(*with_plan(fleet, plans, last, optimizer=optimizer), "optimizer", last)


def test_plans_are_of_the_fleet_s_model(planned, first, last):
    fleet, plans = planned
    other = plans[last].model.model_copy(update={"name": "another"})
    rejected(*with_plan(fleet, plans, last, model=other), "model", last)
    rejected(*with_plan(fleet, plans, last, batch=2), "model", last)
    rejected(fleet.model_copy(update={"trained_bytes": fleet.trained_bytes + 4}), plans, "model", first)


@pytest.mark.parametrize("by", [-1, 1])
def test_the_exchange_has_the_memory_that_it_takes(planned, last, by):
    fleet, plans = planned
    held = computing(fleet)[-1].exchange_bytes
    rejected(changed(fleet, last, exchange_bytes=held + by), plans, "exchange", last)


def test_shelves_take_memory(planned, last):
    fleet, plans = planned
    member = computing(fleet)[-1]
    other = {"memory": "disk", "disk": "memory"}
    rejected(changed(fleet, last, states=other[member.states]), plans, "exchange", last)
    rejected(changed(fleet, last, gradients=other[member.gradients]), plans, "exchange", last)


def test_a_plan_s_floor_holds_the_exchange(planned, last):
    fleet, plans = planned
    plan = plans[last]
    floor = plan.device.floor.model_copy(update={"resident_bytes": computing(fleet)[-1].exchange_bytes - 1})
    device = plan.device.model_copy(update={"floor": floor})
    rejected(*with_plan(fleet, plans, last, device=device, floor_bytes=floor.held_bytes), "exchange", last)
    rejected(*with_plan(fleet, plans, last, floor_bytes=plan.floor_bytes - 1), "exchange", last)


def test_peaks_are_within_budgets(planned, last):
    fleet, plans = planned
    rejected(changed(fleet, last, budget_bytes=plans[last].budget_bytes - 1), plans, "budget", last)
    peak = plans[last].peak_bytes
    with pytest.raises(InvalidSchedule, match="budget"):
        simulate_fleet(*with_plan(fleet, plans, last, budget_bytes=peak - 1))


@pytest.mark.parametrize("by", [-1, 1])
def test_peaks_are_those_of_the_plans(planned, last, by):
    fleet, plans = planned
    peak = plans[last].peak_bytes
    rejected(changed(fleet, last, peak_bytes=peak + by), plans, "peak", last)
    # The plan alone may state more than it takes, but not less.
    one, other = with_plan(fleet, plans, last, peak_bytes=peak + by)
    if by > 0:
        rejected(changed(one, last, peak_bytes=peak + by), other, "peak", last)
    else:
        with pytest.raises(InvalidSchedule, match="claims"):
            simulate_fleet(one, other)


@pytest.mark.parametrize("times", [0.99, 1.01])
def test_seconds_are_those_of_the_plans(planned, last, times):
    fleet, plans = planned
    seconds = computing(fleet)[-1].micro_batch_seconds
    rejected(changed(fleet, last, micro_batch_seconds=times * seconds), plans, "seconds", last)
    rejected(*with_plan(fleet, plans, last, step_seconds=times * plans[last].step_seconds), "seconds", last)


@pytest.mark.parametrize("claim", ["makespan_seconds", "compute_seconds", "exchange_seconds", "update_seconds"])
@pytest.mark.parametrize("by", [-1e-6, 1e-6])
def test_the_makespan_is_the_replay_s(planned, claim, by):
    fleet, plans = planned
    rejected(fleet.model_copy(update={claim: getattr(fleet, claim) + by}), plans, "makespan", claim)


def test_no_bound_is_above_what_it_bounds(planned, last):
    fleet, plans = planned
    rejected(fleet.model_copy(update={"bound_seconds": 1.0001 * fleet.makespan_seconds}), plans, "bound")
    rejected(fleet.model_copy(update={"bound_seconds": -1.0}), plans, "bound")
    seconds = computing(fleet)[-1].micro_batch_seconds
    rejected(changed(fleet, last, bound_seconds=1.0001 * seconds), plans, "bound", last)


def test_a_broken_schedule_of_a_member_is_found(planned, last):
    fleet, plans = planned
    train = plans[last].train
    cut = train.model_copy(update={"instructions": train.instructions[:-1]})
    with pytest.raises(InvalidSchedule):
        simulate_fleet(*with_plan(fleet, plans, last, train=cut))


def test_another_order_takes_another_time(planned):
    """Members that change places: their runs of micro-batches, slots and memory change along, or it does not hold."""
    fleet, plans = planned
    one, other, *rest = fleet.replicas
    swapped = fleet.model_copy(update={"replicas": [other, one, *rest]})
    rejected(swapped, plans, "micro-batches", other.parts[0].member)
