"""The searches for the shortest step: of the sum's chain (`SumSearch`), of a model's division (`DivisionSearch`), of
one device.

**The chain of the sum.** An integer program proposes, members plan, the clock judges. The search begins with a plan for
every member at its leanest: nothing of the exchange in memory. With less room a plan is not faster, so that for all
other shelves, roles and numbers of micro-batches its seconds are what can be hoped for. Whatever could be better than
the best chain if hopes came true is planned, so that only few rooms ever are. Chains are judged by `clock.play_sum`.
The integer program proposes some, for what is hoped for and for what is known; each is changed a little at a time as
long as that makes it better. Last the program with the plans' bounds gives the bound.

**The division.** Which members hold which layers, and how far each is ahead. Divisions are taken in the order of their
bounds. The stages of the first that was not planned are planned, which raises the bounds of all divisions that contain
them; the clock says what it takes. The search ends when no bound is below the best step so far, but for the gap. So it
has tried all divisions, most of them without planning for them. Of many members it tries some (`bounds`), and once its
time is over it plans no more than it has to.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from tightfit.planner.fleet.bounds import (
    Candidate,
    Division,
    DivisionBounds,
    Role,
    Surroundings,
    Terms,
    least_sum_seconds,
    role_of,
    terms,
)
from tightfit.planner.fleet.clock import Station, SumStation, agree, play, play_sum
from tightfit.planner.fleet.part_plans import (
    ALWAYS,
    LEAST_SECONDS,
    AlonePlans,
    KnownStage,
    MemberPlans,
    while_there_is_time,
)
from tightfit.planner.fleet.part_profiles import exchange_bytes, slots_of
from tightfit.planner.fleet.programs import Allotment, Joining, Taken, allot
from tightfit.planner.fleet.schema import Link, Shelf
from tightfit.profiles.schema import DeviceFigures

ROUNDS = 8
"""times that the integer program is solved with hoped seconds, at most"""
SHELVES: tuple[Shelf, ...] = ("disk", "memory")
ROLES: tuple[Role, ...] = ("first", "between", "beside", "last")
Sight = Literal["known", "hoped", "proven"]
"""which seconds of a micro-batch count: a known plan's, what can be hoped for, or what none undercuts"""
LEAN_SHARE = 0.5
"""of the time: for every member's first plan"""
PLAN_SHARE = 0.25
"""of what is left: for one further plan"""
PROGRAM_SHARE, PROGRAM_SECONDS = 0.2, 10.0
"""of what is left, and seconds at most: for one integer program"""
PAIRED = 16
"""fastest members of which each two are a start of their own, and up to which each number of them is"""
STARTS = 4
"""chains that are changed a little at a time before the integer program proposes others, at most"""
NEAR = 1.1
"""the makespan of such a chain is at most this many times that of the best of them"""
PROGRAM_GAP = 1e-4
"""relative, at which an integer program may stop"""
GAIN = 1e-9
"""relative, below which one chain counts as no better than another"""
STAGE_SHARE = 0.25
"""of the time that is left: for the plan of one stage"""
AHEAD_GAIN = 1e-6
"""share of a step: what saves less is no reason to be further ahead"""
ALONE_SHARE = 0.5
"""of the time that is left: for the plan of one member of several that would do everything alone"""
Aheads = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Contributor:
    """A device that may compute micro-batches of a step, whose gradients are added up."""

    name: str
    link: Link
    budget_bytes: int
    device: DeviceFigures
    update_seconds: float
    speed: MemberPlans


class ChainPlace(NamedTuple):
    """A candidate's part in a chain."""

    candidate: int
    micro_batches: int
    gradients: Shelf
    states: Shelf


SumChain = tuple[ChainPlace, ...]


def _silent(makespan: float, bound: float) -> None:
    pass


@dataclass(kw_only=True)
class SumSearch:
    """The search over chains of at least two of `candidates`; holds the best chain and the best bound so far."""

    candidates: Sequence[Contributor]
    pieces: tuple[int, ...]
    micro_batches: int
    gap: float
    deadline: float
    """on the monotonic clock"""
    report: Callable[[float, float], None] = _silent
    """told the best makespan and bound so far"""
    best: SumChain | None = None
    bound: float = math.inf
    """no chain takes less; infinite where there is none"""
    splits: dict[int, set[int]] = field(default_factory=dict)
    """candidate -> numbers of micro-batches at which the range of its ways with gradients in memory is cut"""
    _makespans: dict[tuple[SumChain, Sight], float] = field(default_factory=dict)

    # --- members ---------------------------------------------------------------------------------------------------

    def extra_bytes(self, place: ChainPlace, *, first: bool) -> int:
        """Bytes that the exchange takes there."""
        return exchange_bytes(
            self.candidates[place.candidate].device.floor,
            self.pieces,
            slots=slots_of(place.micro_batches, first=first),
            gradients=place.gradients,
            states=place.states,
        )

    def room(self, place: ChainPlace, *, first: bool) -> int:
        """Bytes of the budget that are left for the plan."""
        return self.candidates[place.candidate].budget_bytes - self.extra_bytes(place, first=first)

    def lean(self, candidate: int) -> int:
        """The largest room that a candidate can have."""
        return self.room(ChainPlace(candidate, 1, "disk", "disk"), first=True)

    def fitting(self) -> list[int]:
        """The candidates that can take part, each of which is planned as far as there is time."""
        able = [
            number
            for number, candidate in enumerate(self.candidates)
            if candidate.budget_bytes >= candidate.device.floor.start_peak_bytes
        ]
        until = time.monotonic() + LEAN_SHARE * self._left()
        open_ = [number for number in able if not self.candidates[number].speed.planned(self.lean(number))]
        # Those for which there is no time are hoped for, as long as nobody plans them.
        always = ALWAYS - len(able) + len(open_)
        for number, share in while_there_is_time(open_, until, always):
            self.candidates[number].speed.plan(self.lean(number), share)
        return [number for number in able if self._holds(number)]

    def _holds(self, candidate: int) -> bool:
        """Whether a candidate was found to hold a micro-batch, or was not planned."""
        return self.candidates[candidate].speed.bound(self.lean(candidate), "disk", first=False) < math.inf

    def station(self, place: ChainPlace, sight: Sight, *, first: bool) -> SumStation:
        """The member as it stands in a chain; it never has computed where it cannot hold its part."""
        candidate = self.candidates[place.candidate]
        return SumStation(
            computed_seconds=place.micro_batches * self._seconds(place, sight, first=first),
            link=candidate.link,
            slots=slots_of(place.micro_batches, first=first),
            gradients=place.gradients,
            states=place.states,
            update_seconds=candidate.update_seconds,
            read=candidate.device.read,
            write=candidate.device.write,
        )

    def _seconds(self, place: ChainPlace, sight: Sight, *, first: bool) -> float:
        speed = self.candidates[place.candidate].speed
        look = {"known": speed.seconds, "hoped": speed.hoped, "proven": speed.bound}[sight]
        return look(self.room(place, first=first), place.gradients, first=first)

    # --- judging ---------------------------------------------------------------------------------------------------

    def makespan(self, chain: SumChain | None, below: float = math.inf, sight: Sight = "known") -> float:
        """Seconds of a step; infinite where members cannot hold their parts, or where it is surely not `below`."""
        if chain is None:
            return math.inf
        # Members that are alike have one makespan in each other's place.
        key = tuple(place._replace(candidate=self._alike[place.candidate]) for place in chain), sight
        if key not in self._makespans:
            stations = [self.station(place, sight, first=not at) for at, place in enumerate(chain)]
            computed = [station.computed_seconds for station in stations]
            if max(computed) >= below or self._least(chain, stations, computed) >= below:
                return math.inf
            self._makespans[key] = play_sum(stations, self.pieces).makespan
        return self._makespans[key]

    @cached_property
    def _alike(self) -> list[int]:
        """For each candidate the first one that differs in nothing but its name."""
        unnamed = [replace(one, name="") for one in self.candidates]
        return [unnamed.index(one) for one in unnamed]

    def _least(self, chain: SumChain, stations: Sequence[SumStation], computed: Sequence[float]) -> float:
        told = [
            self._terms(place.candidate, station, role_of(at, len(chain)), len(chain))
            for at, (place, station) in enumerate(zip(chain, stations))
        ]
        return least_sum_seconds(computed, [place.micro_batches for place in chain], told)

    @cached_property
    def _latencies(self) -> list[tuple[float, int]]:
        """The two smallest latencies, with their candidates."""
        return heapq.nsmallest(2, ((one.link.latency_seconds, at) for at, one in enumerate(self.candidates)))

    def _terms(self, candidate: int, station: SumStation, role: Role, most: int) -> Terms:
        quickest, second = self._latencies
        latency = second[0] if quickest[1] == candidate else quickest[0]
        return terms(station, role, Surroundings(pieces=self.pieces, most=most, latency_seconds=latency))

    def _judge(self, chain: SumChain, below: float) -> float:
        """As `makespan`. A chain that could be better than the best one if hopes came true is planned first; the best
        of all is remembered.
        """
        best = self.makespan(self.best)
        worth = best * (1 - self.gap)
        if self._unplanned(chain) and self.makespan(chain, worth, "hoped") < worth:
            self._plan(chain)
        found = self.makespan(chain, below)
        if found < best * (1 - GAIN):
            self.best = chain
        return found

    def _unplanned(self, chain: SumChain) -> list[tuple[ChainPlace, bool]]:
        """The places, and whether they are first, whose plans are only hoped for."""
        return [
            (place, not at)
            for at, place in enumerate(chain)
            if not self.candidates[place.candidate].speed.planned(self.room(place, first=not at))
            and self._seconds(place, "known", first=not at) > self._seconds(place, "hoped", first=not at)
        ]

    def _plan(self, chain: SumChain) -> bool:
        """Plan what a chain hopes for, as long as there is time; whether there was anything."""
        fresh = False
        for place, first in self._unplanned(chain):
            if self._left() <= 0:
                break
            fresh = True
            self.candidates[place.candidate].speed.plan(self.room(place, first=first), PLAN_SHARE * self._left())
        if fresh:
            self._makespans.clear()
        return fresh

    # --- the search ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Search until nothing is left to try that could gain more than `gap`, or time is over."""
        members = self.fitting()
        if len(members) < 2 or self.micro_batches < 2:
            return
        self.bound = 0.0
        self._begin(members)
        for _ in range(ROUNDS):
            hoped = self._program(members, "hoped")
            chain = _chain(hoped.taken)
            cut = self._cut(chain)
            fresh = self._plan(chain) or cut
            self._climb(chain, members)
            known = self._program(members, "known")
            self._climb(_chain(known.taken), members)
            self.report(self.makespan(self.best), self.bound)
            if not fresh or known.bound_seconds <= hoped.bound_seconds * (1 + self.gap) or self._left() <= 0:
                break

    def _cut(self, chain: SumChain) -> bool:
        """Have the ranges of ways begin anew where a chain has gradients in memory; whether that changes any."""
        fresh = False
        for place in chain[1:]:
            if place.gradients == "memory":
                cuts = self.splits.setdefault(place.candidate, set())
                fresh = fresh or place.micro_batches not in cuts
                cuts.add(place.micro_batches)
        return fresh

    def prove(self) -> None:
        """Find the bound: what no chain takes less than, whatever its plans. To be called after `run`."""
        self.bound = math.inf
        if self.best is not None:
            self.bound = self._program(self.fitting(), "proven").bound_seconds
        self.report(self.makespan(self.best), self.bound)

    def _begin(self, members: Sequence[int]) -> None:
        """Climb from the best of chains in which each micro-batch goes to the member that would be the first to have
        computed it: of two members, in either order, and of the fastest three, four and so on, of many in larger
        strides.
        """
        seconds = {at: self._seconds(ChainPlace(at, 1, "disk", "disk"), "known", first=False) for at in members}
        fastest = sorted(members, key=seconds.__getitem__)
        starts = [self._shared_out(pair, seconds) for pair in itertools.combinations(fastest[:PAIRED], 2)]
        starts += [(last, first) for first, last in starts]
        count = 3
        while count <= min(len(fastest), self.micro_batches):
            starts.append(self._shared_out(fastest[:count], seconds))
            count += max(1, count // PAIRED)
        until = time.monotonic() + LEAN_SHARE * self._left()
        judged: list[tuple[float, int]] = []
        for number, start in enumerate(starts):
            if judged and time.monotonic() > until:
                break
            judged.append((self.makespan(start), number))
        starts = [starts[number] for _, number in sorted(judged)]
        near = NEAR * self.makespan(starts[0])
        for chain in starts[:STARTS]:
            if self.makespan(chain) <= near:
                self._climb(chain, members)

    def _shared_out(self, members: Sequence[int], seconds: Mapping[int, float]) -> SumChain:
        shares = dict.fromkeys(members[: self.micro_batches], 1)
        done = [(2 * seconds[at], at) for at in shares]
        heapq.heapify(done)
        for _ in range(self.micro_batches - len(shares)):
            at = done[0][1]
            shares[at] += 1
            heapq.heapreplace(done, ((shares[at] + 1) * seconds[at], at))
        order = sorted(shares, key=lambda at: shares[at] * seconds[at])
        return tuple(ChainPlace(at, shares[at], "disk", "disk") for at in order)

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _program(self, members: Sequence[int], sight: Sight) -> Allotment:
        """The answer of the integer program. Ways that are slower than the best chain are left out, so that where there
        is no better one the bound is its makespan.
        """
        limit = min(PROGRAM_SECONDS, max(LEAST_SECONDS, PROGRAM_SHARE * self._left()))
        none = Allotment(taken=[], bound_seconds=self.makespan(self.best))
        try:
            found = allot(self._ways(members, sight), self.micro_batches, time_limit=limit, gap=PROGRAM_GAP)
        except TimeoutError:
            return Allotment(taken=[], bound_seconds=0.0)
        return none if found is None or found.bound_seconds > none.bound_seconds else found

    def _ways(self, members: Sequence[int], sight: Sight) -> list[Joining]:
        """All ways to take part, with the seconds that are in `sight`."""
        result = []
        for member in members:
            for role in ROLES[:1] + ROLES[-min(3, len(members) - 1) :]:
                for gradients in SHELVES:
                    for states in SHELVES:
                        place = ChainPlace(member, 1, gradients, states)
                        for least, most in self._ranges(place, sight, first=role == "first"):
                            one = place._replace(micro_batches=most if sight == "known" else least)
                            way = self._way(one, role, least, most, len(members), sight)
                            if way is not None:
                                result.append(way)
        return result

    def _ranges(self, place: ChainPlace, sight: Sight, *, first: bool) -> list[tuple[int, int]]:
        """Ranges of micro-batches with one number of seconds: a known plan with room for some slots also has it for
        fewer, and what can be hoped for with some slots holds for more. Where it differs, ranges begin at powers of
        two, and wherever a chain was proposed.
        """
        most = self.micro_batches - 1
        cuts = self.splits.get(place.candidate, set())
        if first or place.gradients == "disk":
            return [(1, most)]
        if sight == "known":
            return [(1, cut) for cut in sorted(cuts)]
        begins: list[int] = []
        before = math.nan
        for begin in sorted({1 << power for power in range(most.bit_length())} | cuts):
            seconds = self._seconds(place._replace(micro_batches=begin), sight, first=False)
            if seconds != before:
                begins.append(begin)
            before = seconds
        return list(zip(begins, [*(begin - 1 for begin in begins[1:]), most]))

    def _way(self, place: ChainPlace, role: Role, least: int, most: int, members: int, sight: Sight) -> Joining | None:
        first = role == "first"
        seconds = self._seconds(place, sight, first=first)
        if seconds == math.inf:
            return None
        found = self._terms(place.candidate, self.station(place, sight, first=first), role, members)
        worth = self.makespan(self.best) * (1 + GAIN)
        rows = (*found.own, *found.common)
        rates = [(row.fixed, seconds + row.each) for row in rows if seconds + row.each > 0]
        most = min([most, *(int((worth - fixed) // each) for fixed, each in rates)])
        if most < least:
            return None
        return Joining(
            member=place.candidate,
            role=role,
            gradients=place.gradients,
            states=place.states,
            least=least,
            most=most,
            seconds=seconds,
            terms=found,
        )

    def _climb(self, chain: SumChain, members: Sequence[int]) -> None:
        """Change a chain a little at a time, as long as it gets better."""
        if not chain:
            return
        here = self._judge(chain, math.inf)
        better: SumChain | None = chain
        while better is not None and self._left() > 0:
            chain, better = better, None
            for other in self._neighbours(chain, members):
                if self._left() <= 0:
                    return
                found = self._judge(other, here * (1 - GAIN))
                if found < here * (1 - GAIN):
                    here, better = found, other
                    break

    def _neighbours(self, chain: SumChain, members: Sequence[int]) -> Iterator[SumChain]:
        yield from self.shelves(chain)
        places = list(chain)
        outside = self._outside(places, members)
        for at, place in enumerate(places):
            fewer = place._replace(micro_batches=place.micro_batches - 1)
            for other, one in enumerate(places):
                if other != at:
                    changed = list(places)
                    changed[other] = one._replace(micro_batches=one.micro_batches + 1)
                    changed[at] = fewer
                    yield from _at_least_two(changed)
            for member in outside:
                for position in range(len(places) + 1):
                    changed = list(places)
                    changed[at] = fewer
                    changed.insert(position, ChainPlace(member, 1, "disk", "disk"))
                    yield from _at_least_two(changed)
        for at in range(len(places)):
            for other in range(at):
                changed = list(places)
                changed[at], changed[other] = changed[other], changed[at]
                yield tuple(changed)
                moved = list(places)
                moved.insert(other, moved.pop(at))
                yield tuple(moved)
            for member in outside:
                yield (*chain[:at], places[at]._replace(candidate=member), *chain[at + 1 :])

    def _outside(self, places: Sequence[ChainPlace], members: Sequence[int]) -> list[int]:
        """Members that are in no place, one of each that are alike."""
        taking = {place.candidate for place in places}
        return sorted({self._alike[at]: at for at in reversed(members) if at not in taking}.values())

    def shelves(self, chain: SumChain) -> Iterator[SumChain]:
        """The chains that differ from this in one member's shelves."""
        for at, place in enumerate(chain):
            for gradients, states in itertools.product(SHELVES, SHELVES):
                if (gradients, states) != (place.gradients, place.states):
                    other = place._replace(gradients=gradients, states=states)
                    yield (*chain[:at], other, *chain[at + 1 :])


def _at_least_two(places: Sequence[ChainPlace]) -> Iterator[SumChain]:
    left = tuple(place for place in places if place.micro_batches)
    if len(left) > 1:
        yield left


def _chain(taken: Sequence[Taken]) -> SumChain:
    """The chain of an allotment; those between are in the order in which they have computed."""
    order = sorted(taken, key=lambda one: (ROLES.index(one.way.role), one.micro_batches * one.way.seconds))
    return tuple(ChainPlace(one.way.member, one.micro_batches, one.way.gradients, one.way.states) for one in order)


# --- divisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A division with how far its stages are ahead, and what a step takes."""

    division: Division
    aheads: Aheads
    makespan: float


@dataclass(kw_only=True)
class DivisionSearch:
    candidates: Sequence[Candidate]
    micro_batches: int
    gap: float
    deadline: float
    report: Callable[[float, float], None] = _silent
    """called with the makespan so far and the bound"""
    plans: bool = True
    """whether to plan stages that were not planned"""
    best: Pipeline | None = None
    bound: float = 0.0
    """seconds that no division undercuts"""
    tried: set[Division] = field(default_factory=set)
    """divisions all of whose stages have been planned"""
    stopped: bool = False
    """whether the time was over before all was tried"""

    @property
    def makespan(self) -> float:
        return math.inf if self.best is None else self.best.makespan

    def run(self) -> None:
        """Try divisions until none is left that may be better, or the time is up. Raises KeyboardInterrupt on
        Ctrl-C.
        """
        late = 0
        while True:
            bounds = DivisionBounds(self.candidates, self.micro_batches)
            self.bound = max(self.bound, min(bounds.least, self.makespan))
            self.report(self.makespan, self.bound)
            following = self._following(bounds)
            if following is None:
                return
            late += self._late()
            self.stopped = bool(late) and (self.best is not None or late > ALWAYS)
            if self.stopped:
                return
            self.attempt(following)

    def _following(self, bounds: DivisionBounds) -> Division | None:
        """The first division that may be better and was not tried."""
        for least, division in bounds.divisions():
            if least >= (1 - self.gap) * self.makespan:
                return None
            if division not in self.tried:
                return division
        return None

    def attempt(self, division: Division) -> Pipeline | None:
        """Plan a division's stages, and keep it if its step is the shortest so far; None: something of it does not fit,
        or it cannot be better.
        """
        for at in range(len(division) + 1):
            if DivisionBounds(self.candidates, self.micro_batches).bound(division) >= (1 - self.gap) * self.makespan:
                return None
            if at < len(division) and self.known(division, at, 0) is None:
                return None
        self.tried.add(division)
        found = self.choose(division)
        if found.makespan < self.makespan:
            self.best = found
        return found

    # --- how far stages are ahead ----------------------------------------------------------------------------------

    def choose(self, division: Division) -> Pipeline:
        """A division whose stages have been planned, with the best of how far they are ahead that is found in time.

        Where a stage is in turns, those above have one micro-batch at a time, so that they are in turns too.
        """
        ways = [self._pipeline(division, (0,) * len(division))]
        ways += [self._ahead(division, count) for count in range(1, len(division)) if not self._late()]
        return min(ways, key=lambda one: one.makespan)

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _ahead(self, division: Division, count: int) -> Pipeline:
        """The best found with the first `count` stages ahead."""
        aheads = self._climbed(division, count)
        found = self._pipeline(division, aheads)
        while found.makespan == math.inf and (less := self._fitting(division, aheads)) != aheads:
            aheads = less
            found = self._pipeline(division, aheads)
        while True:
            nearer = [one for one in _changed(found.aheads, count, -1) if min(one[:count]) > 0 and agree(one)]
            tried = [self._pipeline(division, one) for one in nearer]
            better = min(tried, key=lambda one: one.makespan, default=found)
            if better.makespan >= found.makespan or self._late():
                return found
            found = better

    def _climbed(self, division: Division, count: int) -> Aheads:
        """How far the first `count` stages are ahead at best, if messages took no memory."""
        aheads = tuple(int(at < count) for at in range(len(division)))
        known = [self.known(division, at, 0) for at in range(len(division))]
        best = self._played(division, aheads, known)
        while True:
            farther = [one for one in _changed(aheads, count, 1) if max(one) <= self.micro_batches and agree(one)]
            if not farther or self._late():
                return aheads
            seconds, better = min((self._played(division, one, known), one) for one in farther)
            if seconds >= best * (1 - AHEAD_GAIN):
                return aheads
            aheads, best = better, seconds

    def _fitting(self, division: Division, aheads: Aheads) -> Aheads:
        """Less far ahead below every stage that has no room for as many messages."""
        unfit = [self.known(division, at + 1, ahead) is None for at, ahead in enumerate(aheads[:-1])]
        fewer = [ahead - 1 if less and ahead > 1 else ahead for ahead, less in zip(aheads, unfit)]
        return (*itertools.accumulate(fewer, min), aheads[-1])

    # --- what a step takes -----------------------------------------------------------------------------------------

    def _pipeline(self, division: Division, aheads: Aheads) -> Pipeline:
        known = [self.known(division, at, aheads[at - 1] if at else 0) for at in range(len(division))]
        return Pipeline(division=division, aheads=aheads, makespan=self._played(division, aheads, known))

    def _played(self, division: Division, aheads: Aheads, known: Sequence[KnownStage | None]) -> float:
        stations = []
        for held, ahead, one in zip(division, aheads, known):
            if one is None:
                return math.inf
            candidate = self.candidates[held.candidate]
            stations.append(
                Station(
                    train=one.train,
                    forward=one.forward,
                    ahead=ahead,
                    link=candidate.link,
                    up_bytes=candidate.plans.up_bytes.get(held.last, 0),
                    down_bytes=candidate.plans.down_bytes.get(held.first, 0),
                )
            )
        return play(stations, self.micro_batches).makespan

    def known(self, division: Division, at: int, ahead_below: int) -> KnownStage | None:
        """The plan of a stage, which is made if there is none; but not for one below that is ahead, once the time is
        over.
        """
        held = division[at]
        candidate = self.candidates[held.candidate]
        room = candidate.plans.room(held.layers, candidate.budget_bytes, ahead_below)
        if not self.plans or (ahead_below and self._late()):
            return candidate.plans.best(held.layers, room)
        return candidate.plans.plan(held.layers, room, STAGE_SHARE * (self.deadline - time.monotonic()))


def _changed(aheads: Aheads, count: int, by: int) -> Iterator[Aheads]:
    """Neighbours among the first `count` stages, `by` micro-batches farther ahead."""
    for first in range(count):
        for last in range(first + 1, count + 1):
            yield tuple(ahead + by * (first <= at < last) for at, ahead in enumerate(aheads))


# --- one member alone -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class AloneSearch:
    """The search for the member whose step is the shortest if it takes part alone."""

    plans: Sequence[AlonePlans]
    """by member; those with equal profiles share theirs"""
    budgets: Sequence[int]
    best: int | None = None
    _tried: set[int] = field(default_factory=set)

    @property
    def makespan(self) -> float:
        """Seconds of the best member's step."""
        return math.inf if self.best is None else self.plans[self.best].makespan(self.budgets[self.best])

    @property
    def bound(self) -> float:
        """No member alone takes less."""
        return min(plans.bound(budget) for plans, budget in zip(self.plans, self.budgets))

    def run(self, deadline: float, *, needed: bool) -> None:
        """Plan members, until none that is left can be faster than those that have been planned, or the time is over
        and, if one is `needed`, one was found.
        """
        order = sorted(
            range(len(self.plans)), key=lambda at: (self.plans[at].bound(self.budgets[at]), -self.budgets[at])
        )
        for at in order:
            plans, budget = self.plans[at], self.budgets[at]
            larger = any(self.plans[other] is plans and self.budgets[other] >= budget for other in self._tried)
            if plans.bound(budget) < self.makespan and not larger:
                left = deadline - time.monotonic()
                if left <= 0 and (self.best is not None or not needed):
                    break
                plans.plan(budget, left if len(order) == 1 else ALONE_SHARE * left)
                self._tried.add(at)
                if plans.makespan(budget) < self.makespan:
                    self.best = at
