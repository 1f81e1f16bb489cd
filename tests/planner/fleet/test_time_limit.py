"""One time limit for all solves of a call: fleets of 100 and 1,000 members of few device models, with budgets and links
of their own, are planned with a number of solves that does not grow with the fleet once the time is over.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import replace

import pytest
from fleet_kinds import plan_federated, plan_kind, plan_pipeline, plan_split
from synthetic import MIB

from tightfit.planner.fleet.kinds.rounds import in_turn
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.part_plans import ALWAYS, AlonePlans, MemberPlans, StagePlans, while_there_is_time
from tightfit.planner.fleet.schema import Link
from tightfit.runtime.common.errors import InfeasibleError

FLOWER = 2 * MIB
LORA = {"rank": 4, "alpha": 8.0}
SPEEDS = (1.0, 0.6, 0.3)
NONE = 1e-3
"""seconds that are over at once"""


@pytest.fixture
def crowd(stages):
    """Makes so many members of three device models, whose budgets are drawn between two numbers of MiB."""

    def made(count, least=18.0, most=40.0):
        draw = random.Random(count)
        profiles = [
            one.profile.model_copy(update={"model": one.profile.model.model_copy(update={"lora": LORA})})
            for one in stages(SPEEDS)
        ]
        result = []
        for number in range(count):
            up, down = (draw.uniform(1e6, 5e7) for _ in range(2))
            link = Link(up_bytes_per_second=up, down_bytes_per_second=down, latency_seconds=draw.choice([0.0, 1e-3]))
            budget = int(draw.uniform(least, most) * MIB)
            result.append(MemberSpec(name=f"m{number}", profile=profiles[number % 3], budget_bytes=budget, link=link))
        return result

    return made


@pytest.fixture
def unlike():
    """Makes a device model of its own of every member."""

    def made(members):
        return [
            replace(one, profile=one.profile.model_copy(update={"fingerprint": f"{number:064x}"}))
            for number, one in enumerate(members)
        ]

    return made


@pytest.fixture
def solves(monkeypatch):
    """How many plans were solved for, by the class that asked."""
    asked: Counter[str] = Counter()

    def counted(kind, known):
        once = kind.plan

        def plan(self, *arguments):
            asked[kind.__name__] += not known(self, *arguments)
            return once(self, *arguments)

        monkeypatch.setattr(kind, "plan", plan)

    counted(AlonePlans, lambda self, budget, _: self.planned(budget))
    counted(MemberPlans, lambda self, room, _: self.planned(room))
    counted(StagePlans, lambda self, layers, room, _: self.planned(layers, room))
    return asked


def test_each_has_its_share_of_the_time_and_the_first_few_have_some_without():
    shares = [share for _, share in while_there_is_time(range(4), time.monotonic() + 400.0)]
    assert shares == pytest.approx([100.0, 400 / 3, 200.0, 400.0], rel=1e-3)
    assert [thing for thing, _ in while_there_is_time(range(1000), time.monotonic() - 1.0)] == [*range(ALWAYS)]
    assert [*while_there_is_time(range(1000), time.monotonic() - 1.0, always=0)] == []


@pytest.mark.parametrize("count", [1, 2, 3, 8, 97])
def test_of_equal_members_the_ends_are_first_and_every_budget_has_its_turn(count):
    ours, others = object(), object()
    draw = random.Random(count)
    budgets = [draw.randrange(1, 10 * count) for _ in range(count)] + [7]
    order = in_turn([ours] * count + [others], budgets)
    assert {budgets[at] for at in order if at < count} == {*budgets[:count]}
    assert len(order) == len({*budgets[:count]}) + 1
    mine = [budgets[at] for at in order if at < count]
    assert sorted(mine[:2]) == sorted({min(mine), max(mine)})
    widest = max(b - a for a, b in zip(sorted(mine[:9]), sorted(mine[:9])[1:])) if count == 97 else 0
    assert widest <= (max(mine) - min(mine)) / 4


@pytest.mark.slow
def test_rounds(crowd, solves):
    """Those that were not planned have the plans of others."""
    count = 1000
    devices = crowd(count)
    fleet, plans = plan_federated(devices, 4 * count, flower_bytes=FLOWER, start=0.1, time_limit=NONE)
    assert solves == {"AlonePlans": ALWAYS}
    taking = fleet.names
    assert taking == [*plans]
    assert len(taking) > count / 4 > len({plan.fingerprint for plan in plans.values()})
    assert fleet.bound_seconds <= fleet.makespan_seconds
    budgets = {device.name: device.budget_bytes for device in devices}
    assert all(
        plan.budget_bytes + FLOWER <= budgets[name] for name, plan in plans.items()
    )  # of others, but their own cap
    reasons = {member.reason for member in fleet.idle}
    assert any(reason.startswith("it cannot hold a step: it needs ") for reason in reasons)


@pytest.mark.slow
def test_rounds_of_devices_that_nobody_could_plan(crowd, unlike, solves):
    """Sixteen device models were planned for; the others take no part, and say so."""
    devices = unlike(crowd(100, 40.0, 41.0))
    fleet, _ = plan_federated(devices, 400, flower_bytes=FLOWER, time_limit=NONE)
    assert solves["AlonePlans"] == len(fleet.names) == ALWAYS
    assert {member.reason for member in fleet.idle} == {"there was no time to plan it; give time_limit more"}
    small = [replace(device, budget_bytes=FLOWER + MIB) for device in devices]
    with pytest.raises(InfeasibleError, match="of 84 others none was planned: there was no time to plan it"):
        plan_federated(small, 400, flower_bytes=FLOWER, time_limit=NONE)


def test_split_rounds(crowd, solves):
    count = 100
    server = replace(crowd(1)[0], name="server", budget_bytes=60 * MIB)
    options = {"flower_bytes": FLOWER, "start": 0.1, "server_start": 0.1, "time_limit": NONE}
    fleet, plans = plan_split(server, crowd(count), 2 * count, **options)
    assert solves["AlonePlans"] <= ALWAYS
    assert solves["StagePlans"] <= 4 * ALWAYS
    lower, upper = ({plans[replica.parts[at].plan].fingerprint for replica in fleet.replicas} for at in (0, 1))
    assert len(fleet.names) > count / 2 > len(lower)
    assert len(upper) < 10
    assert fleet.bound_seconds <= fleet.makespan_seconds


@pytest.mark.parametrize(("count", "least"), [(100, 14.0), (1000, 30.0)])
def test_pipelines(crowd, solves, count, least):
    fleet, _ = plan_pipeline(crowd(count, least, least + 8), 4, time_limit=NONE)
    assert solves["StagePlans"] <= 6 * ALWAYS
    assert 0 < fleet.bound_seconds <= fleet.makespan_seconds < math.inf
    reasons = {member.reason for member in fleet.idle}
    assert reasons <= {"a step is not shorter with it", "it cannot hold any of the stages"}


@pytest.mark.slow
def test_a_pipeline_of_many_is_no_worse_than_one_of_its_best(crowd):
    members = crowd(100, 14.0, 20.0)
    fleet, _ = plan_pipeline(members, 4, time_limit=2.0)
    few = sorted(members, key=lambda one: (SPEEDS.index(SPEEDS[int(one.name[1:]) % 3]), -one.budget_bytes))[:4]
    best, _ = plan_pipeline(few, 4, time_limit=30.0)
    assert fleet.makespan_seconds <= 1.05 * best.makespan_seconds
    assert fleet.bound_seconds <= best.makespan_seconds


def test_where_there_was_no_time_to_find_a_pipeline(crowd, unlike, solves):
    """No device has room for a stage; each is a model of its own, so that nothing is known before it is planned."""
    with pytest.raises(InfeasibleError, match="so that its parts fit on devices of the fleet; give time_limit more"):
        plan_pipeline(unlike(crowd(100, 9.0, 10.0)), 4, time_limit=NONE)
    assert solves["StagePlans"] <= 2 * ALWAYS


@pytest.mark.slow
def test_the_kind_may_be_open(crowd, solves):
    fleet, _, why = plan_kind(crowd(1000), 8, time_limit=NONE)
    assert fleet.makespan_seconds < math.inf
    assert why
    assert solves["MemberPlans"] <= ALWAYS + 4
    assert sum(solves.values()) < 8 * ALWAYS
