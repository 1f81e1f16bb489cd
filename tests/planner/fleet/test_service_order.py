"""The order of services against all orders and ways, its bounds, and the sharing out of steps."""

import itertools
import random

import pytest

from tightfit.planner.fleet.programs import Way, best_order, jackson_bound, served, shared_by_weight


def drawn(seed, most=6, ways=1):
    draw = random.Random(seed)

    def way():
        head, service, tail = (draw.choice([0.0, 1.0, draw.uniform(0, 9)]) for _ in range(3))
        return Way(head=head, service=service + 0.1, tail=tail)

    return [[way() for _ in range(draw.randint(1, ways))] for _ in range(draw.randint(1, most))]


def makespan(all_served):
    return max(one.answered for one in all_served)


def every(ways):
    """The makespan of every order with every choice of ways."""
    for chosen in itertools.product(*(range(len(own)) for own in ways)):
        for order in itertools.permutations(range(len(ways))):
            yield makespan(served(ways, [(device, chosen[device]) for device in order]))


@pytest.mark.parametrize("seed", range(20))
def test_no_order_and_no_ways_end_sooner(seed):
    ways = drawn(seed, most=6 if seed % 2 else 4, ways=1 if seed % 2 else 3)
    found, best = best_order(ways, 20.0), min(every(ways))
    assert found.makespan == pytest.approx(best, rel=1e-5)
    assert found.bound <= best * (1 + 1e-9)
    assert found.bound == pytest.approx(best, rel=1e-5)
    assert sorted(one.device for one in found.served) == list(range(len(ways)))
    assert found.served == served(ways, [(one.device, one.way) for one in found.served])


@pytest.mark.parametrize("seed", range(100, 120))
def test_no_order_undercuts_jacksons_bound(seed):
    ways = drawn(seed, most=5)
    jobs = [own[0] for own in ways]
    bound = jackson_bound(jobs)
    assert bound <= min(every(ways)) * (1 + 1e-12)
    assert bound >= max(one.head + one.service + one.tail for one in jobs) * (1 - 1e-12)
    assert bound >= (min(one.head for one in jobs) + sum(one.service for one in jobs)) * (1 - 1e-12)


def test_jacksons_bound_leaves_a_device_for_one_with_a_longer_tail():
    long, urgent = Way(head=0.0, service=10.0, tail=0.0), Way(head=1.0, service=1.0, tail=20.0)
    assert jackson_bound([long, urgent]) == pytest.approx(22.0)
    # No order can leave it: it is better to wait for the one with the longer tail.
    assert best_order([[long], [urgent]], 5.0).makespan == pytest.approx(22.0)


def test_of_twenty_devices_the_best_order_is_proven():
    draw = random.Random(1)
    ways = [
        [Way(head=draw.uniform(0, 40), service=draw.uniform(1, 4), tail=draw.uniform(0, 40)) for _ in range(2)]
        for _ in range(20)
    ]
    found = best_order(ways, 30.0)
    assert found.bound == pytest.approx(found.makespan, rel=1e-4)


def test_where_time_is_short_the_bound_still_holds():
    ways = drawn(7, most=6, ways=3)
    found = best_order(ways, 0.0)
    assert found.bound <= min(every(ways)) * (1 + 1e-9) <= found.makespan * (1 + 1e-9)


@pytest.mark.parametrize(
    ("weights", "units", "shares"),
    [
        ([1, 1, 1], 6, [2, 2, 2]),
        ([1, 1, 1], 5, [2, 2, 1]),
        ([1, 1, 1], 2, [1, 1, 0]),
        ([2, 1], 6, [4, 2]),
        ([3, 1], 2, [2, 0]),
    ],
)
def test_steps_are_shared_out_by_weight(weights, units, shares):
    assert shared_by_weight(weights, units) == shares
