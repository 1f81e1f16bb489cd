"""What a fleet's plan is compared with: fixed ways to share the work, and what more memory or a faster link would bring."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from tightfit.planner.fleet.alone import AloneSearch
from tightfit.planner.fleet.schema import Baseline, FleetPlan, Link, Price
from tightfit.planner.fleet.search import Candidate, Chain, ChainSearch, Place

TENTH = 10
"""more memory is at most this part of a member's budget, so that it also says something about a small one"""
FASTER = 2.0
"""how many times as fast the faster link is"""


def baselines(search: ChainSearch, alone: AloneSearch, names: list[str], deadline: float) -> list[Baseline]:
    """The two fixed ways to share a step, judged like any other. `search` and `alone` have run."""
    count = search.micro_batches
    shares = [count // len(names) + (at < count % len(names)) for at in range(len(names))]
    equal = Baseline(name="equal shares", makespan_seconds=None, micro_batches=dict(zip(names, shares)))
    parts = [at for at, share in enumerate(shares) if share]
    if len(parts) == 1:
        alone.plans[parts[0]].plan(alone.budgets[parts[0]], deadline - time.monotonic())
        makespan = alone.plans[parts[0]].makespan(alone.budgets[parts[0]])
        unfit = parts
    else:
        makespan = _best_shelves(search, deadline, tuple(Place(at, shares[at], "disk", "disk") for at in parts))
        fitting = search.fitting()
        unfit = [at for at in parts if at not in fitting]
    if makespan < math.inf:
        equal = equal.model_copy(update={"makespan_seconds": makespan})
    else:
        told = ", ".join(names[at] for at in unfit)
        equal = equal.model_copy(update={"reason": f"{told} cannot hold a micro-batch"})
    fastest = Baseline(name="fastest alone", makespan_seconds=None, micro_batches=dict.fromkeys(names, 0))
    if alone.best is None:
        none = alone.bound == math.inf
        reason = "no device can hold a micro-batch alone" if none else "it was not planned before the search was ended"
        return [equal, fastest.model_copy(update={"reason": reason})]
    working = {**fastest.micro_batches, names[alone.best]: count}
    return [equal, fastest.model_copy(update={"makespan_seconds": alone.makespan, "micro_batches": working})]


def _best_shelves(search: ChainSearch, deadline: float, chain: Chain) -> float:
    """The makespan of a chain with the best shelves among those that are known to fit, as far as there is time to look."""
    best = search.makespan(chain)
    while True:
        better = chain
        for other in search.shelves(chain):
            if time.monotonic() > deadline:
                return best
            if (found := search.makespan(other, best)) < best:
                best, better = found, other
        if better is chain:
            return best
        chain = better


def prices(fleet: FleetPlan, search: ChainSearch, alone: AloneSearch, names: list[str], deadline: float) -> list[Price]:
    """By how much a step gets shorter if one of the members that compute has more memory, or a faster link."""
    result = []
    for number, member in enumerate(fleet.chain):
        at = names.index(member.name)
        until = time.monotonic() + (deadline - time.monotonic()) / (len(fleet.chain) - number)
        more = min(alone.plans[at].planner.neighbour_bytes(member.budget_bytes), member.budget_bytes // TENTH)
        with_memory = with_link = math.inf
        if search.candidates:
            one = search.candidates[at]
            with_link = _with(search, at, replace(one, link=faster(member.link)), until, plans=False)
            roomier = replace(one, budget_bytes=one.budget_bytes + more)
            with_memory = _with(search, at, roomier, until, plans=True)
        if len(fleet.chain) == 1:
            alone.plans[at].plan(member.budget_bytes + more, until - time.monotonic())
            with_memory = min(with_memory, alone.plans[at].makespan(member.budget_bytes + more))
        result.append(price(member.name, more, fleet.makespan_seconds, with_memory=with_memory, with_link=with_link))
    return result


def price(member: str, memory_bytes: int, makespan: float, *, with_memory: float, with_link: float) -> Price:
    """What a step of `makespan` seconds gains by more memory of a member and by a faster link, with which it takes as long."""
    return Price(
        member=member,
        memory_bytes=memory_bytes,
        memory_gain_seconds=max(0.0, makespan - with_memory),
        link_gain_seconds=max(0.0, makespan - with_link),
    )


def faster(link: Link) -> Link:
    """The link with both ways as much faster as links are priced at."""
    up, down = link.up_bytes_per_second, link.down_bytes_per_second
    return link.model_copy(update={"up_bytes_per_second": FASTER * up, "down_bytes_per_second": FASTER * down})


def _with(search: ChainSearch, at: int, changed: Candidate, deadline: float, *, plans: bool) -> float:
    """The makespan of the best chain with one candidate changed, starting from the best so far."""
    candidates = [*search.candidates[:at], changed, *search.candidates[at + 1 :]]
    other = search.like(candidates, deadline, plans=plans)
    other.run()
    return other.makespan(other.best)
