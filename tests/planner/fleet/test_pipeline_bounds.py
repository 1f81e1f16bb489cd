"""The search for a division against all of them: every order, every cut, and every way to be ahead."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field

import pytest
from fleet_kinds import plan_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import MIB

from tightfit.planner.fleet import bounds
from tightfit.planner.fleet.bounds import Candidate, DivisionBounds, Held
from tightfit.planner.fleet.clock import Marks, Station, agree, play
from tightfit.planner.fleet.fleet_search import DivisionSearch
from tightfit.planner.fleet.members import shared
from tightfit.planner.fleet.part_plans import StagePlans
from tightfit.planner.fleet.schema import Link

ROUNDING = 1e-9


def all_divisions(candidates):
    plans = candidates[0].plans
    for count in range(1, len(candidates) + 1):
        for chain in itertools.permutations(range(len(candidates)), count):
            for chosen in itertools.combinations(sorted(plans.cuts), count - 1):
                ends = [0, *chosen, plans.layers]
                yield tuple(Held(one, *pair) for one, pair in zip(chain, itertools.pairwise(ends)))


def enumerated(candidates, micro_batches):
    """The shortest step of each division, over all ways to be ahead, every stage planned with just the room that it
    has.
    """
    found = {}
    for division in all_divisions(candidates):
        ways = itertools.product(*[range(micro_batches + 1)] * (len(division) - 1))
        found[division] = min(step(candidates, micro_batches, division, (*one, 0)) for one in ways if agree((*one, 0)))
    return found


def step(candidates, micro_batches, division, aheads):
    stations = []
    for at, (held, ahead) in enumerate(zip(division, aheads)):
        one = candidates[held.candidate]
        room = one.plans.room(held.layers, one.budget_bytes, aheads[at - 1] if at else 0)
        known = one.plans.plan(held.layers, room, 60.0)
        if known is None:
            return math.inf
        up, down = one.plans.up_bytes.get(held.last, 0), one.plans.down_bytes.get(held.first, 0)
        stations.append(
            Station(train=known.train, forward=known.forward, ahead=ahead, link=one.link, up_bytes=up, down_bytes=down)
        )
    return play(stations, micro_batches).makespan


def check_bounds(candidates, micro_batches, found):
    """No bound is above a step of its division, or of what is left of one."""
    known = DivisionBounds(candidates, micro_batches)
    for division, seconds in found.items():
        assert known.bound(division) <= seconds * (1 + ROUNDING)
    assert known.least <= min(found.values()) * (1 + ROUNDING)
    listed = list(known.divisions())
    least = [bound for bound, _ in listed]
    assert least == sorted(least)
    assert not least or least[0] == pytest.approx(known.least) or (least[0] > known.least and not known.exact)
    if len({one.kind for one in candidates}) == len(candidates) and known.exact:
        assert {division for division, seconds in found.items() if seconds < math.inf} <= {one for _, one in listed}


# --- made-up devices, which plan in no time ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    train: Marks
    forward: Marks


@dataclass
class MadePlans:
    """Stages whose seconds are known: a layer's forward and backward, and more where memory lacks, some of it before
    activations are asked for, while gradients are waited for, and after all is done.
    """

    seconds: list[tuple[float, float]]
    bytes_: list[int]
    lacking: tuple[float, float, float]
    """seconds for a byte that lacks: before, between, after"""
    least: int
    """bytes that a layer needs"""
    messages: int
    cuts: dict[int, None] = field(init=False)
    made: dict[tuple, float] = field(default_factory=dict)

    def __post_init__(self):
        self.layers = len(self.seconds)
        self.cuts = dict.fromkeys(range(1, self.layers))
        self.up_bytes = self.down_bytes = dict.fromkeys(self.cuts, self.messages)

    def room(self, layers, budget_bytes, ahead_below):
        return budget_bytes - self.messages * (ahead_below + 1) * (layers[0] > 0)

    def _found(self, layers, room):
        chosen = slice(*layers)
        if room < self.least * len(self.bytes_[chosen]):
            return None
        forward = sum(one for one, _ in self.seconds[chosen])
        backward = sum(one for _, one in self.seconds[chosen])
        before, between, after = (one * max(0, sum(self.bytes_[chosen]) - room) for one in self.lacking)
        first, last = not layers[0], layers[1] == self.layers
        send = before + forward
        receive = send + between
        end = receive + backward + after
        return Made(
            train=Marks(
                receive_up=0.0 if first else before,
                send_up=0.0 if last else send,
                receive_down=0.0 if last else receive,
                send_down=0.0 if first else end - after,
                middle=receive,
                seconds=end,
            ),
            forward=Marks(
                receive_up=0.0 if first else before,
                send_up=0.0 if last else send,
                middle=send + between,
                seconds=send + between,
            ),
        )

    def plan(self, layers, room, time_limit):
        found = self._found(layers, room)
        self.made[layers, room] = math.inf if found is None else found.train.seconds
        return found

    best = _found

    def planned(self, layers, room):
        return (layers, room) in self.made

    def bound(self, layers, room):
        first, last = layers
        inside = [
            seconds
            for ((begin, end), asked), seconds in self.made.items()
            if first <= begin and end <= last and (asked >= room or (seconds == math.inf and asked == room))
        ]
        return max([sum(sum(one) for one in self.seconds[slice(*layers)]), *inside])

    def forward_bound(self, layers, room):
        return sum(one for one, _ in self.seconds[slice(*layers)])

    def operators(self, layers):
        forward = sum(one for one, _ in self.seconds[slice(*layers)])
        return forward, forward, sum(one for _, one in self.seconds[slice(*layers)])


SECONDS = st.floats(0.05, 2.0)


@st.composite
def fleets(draw):
    count, layers = draw(st.sampled_from([(2, 4), (2, 5), (3, 3), (3, 4)]))
    messages = draw(st.sampled_from([1, 50]))
    sizes = draw(st.lists(st.integers(10, 400), min_size=layers, max_size=layers))
    shapes = draw(st.lists(st.tuples(SECONDS, SECONDS), min_size=layers, max_size=layers))
    candidates = []
    for at in range(count):
        speed = draw(st.sampled_from([1.0, 1.7]))
        plans = MadePlans(
            seconds=[(one * speed, other * speed) for one, other in shapes],
            bytes_=sizes,
            lacking=draw(st.sampled_from([(0.0, 0.0, 0.0), (0.0, 0.01, 0.0), (0.002, 0.0, 0.004)])),
            least=draw(st.sampled_from([0, 100])),
            messages=messages,
        )
        rate, latency = draw(st.sampled_from([20.0, 1e3])), draw(st.sampled_from([0.0, 0.3]))
        link = Link(up_bytes_per_second=rate, down_bytes_per_second=2 * rate, latency_seconds=latency)
        budget = draw(st.integers(200, 900))
        candidates.append(Candidate(name="abc"[at], plans=plans, budget_bytes=budget, link=link))
    return candidates, draw(st.integers(1, 4 if count == 2 else 3))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(made=fleets())
def test_made_up_devices(made):
    candidates, micro_batches = made
    search = DivisionSearch(
        candidates=candidates, micro_batches=micro_batches, gap=0.0, deadline=time.monotonic() + 600.0
    )
    search.run()
    bound, makespan = search.bound, search.makespan
    check_bounds(candidates, micro_batches, found := enumerated(candidates, micro_batches))
    best = min(found.values())
    assert bound <= best * (1 + ROUNDING)
    assert makespan >= best * (1 - ROUNDING)
    assert makespan <= best * 1.01 or makespan == best == math.inf


@settings(max_examples=100, deadline=None)
@given(made=fleets())
def test_made_up_devices_that_are_too_many(made):
    """Bounds that forget who holds the layers above hold too, and a division is found."""
    candidates, micro_batches = made
    search = DivisionSearch(
        candidates=candidates, micro_batches=micro_batches, gap=0.0, deadline=time.monotonic() + 600.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "MOST_SETS", 0)
        search.run()
        check_bounds(candidates, micro_batches, found := enumerated(candidates, micro_batches))
    best = min(found.values())
    assert search.bound <= best * (1 + ROUNDING)
    assert best * (1 - ROUNDING) <= search.makespan
    assert search.makespan <= best * 1.2 or search.makespan == best == math.inf


# --- devices that plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"budget": 18 * MIB}, {"latency": 0.05, "rate": 1e6}])
def test_devices_that_plan(options, stages):
    specs, micro_batches, gap = stages((1.0, 1.0), **{"budget": 20 * MIB, "layers": 3} | options), 3, 1e-2
    plans = shared([one.profile for one in specs], lambda one: StagePlans(one, micro_batches, 0, gap / 2))
    candidates = [
        Candidate(name=one.name, plans=own, budget_bytes=one.budget_bytes, link=one.link)
        for one, own in zip(specs, plans)
    ]
    found = enumerated(candidates, micro_batches)
    best = min(found.values())
    assert best < math.inf
    check_bounds(candidates, micro_batches, found)
    fleet, _ = plan_pipeline(specs, micro_batches, gap=gap)
    assert fleet.bound_seconds <= best * (1 + ROUNDING)
    assert fleet.makespan_seconds <= best * (1 + gap)
