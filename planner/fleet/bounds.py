"""Lower bounds on a step: what no allotment of micro-batches, no division of a model and no plans undercut, by the
clock.

**The sum** (`terms`): what every step takes beyond its computation, linear in the micro-batches, proven for a member i
of the chain 0 … n-1. C_i is when i has computed, C the latest of these, and j a member with C_j = C. P are the bytes of
all pieces, U_i the whole update of i, which begins when i has all means and has passed all pieces on.

- *Own rows* (after C_i). Before C_i no thread of i runs and no piece is under way to it. So after C_i its uplink and
  its downlink carry everything that passes over them (P at the ends, 2 P between), its disk reads the gradients of all
  slots and writes all means, and the thread of the sums adds to one piece after the other, and sends the last. That
  thread begins once a header has come, but to the first, and has been passed on. Then comes U_i.
- *Common rows* (after C). No header passes j before C, so all means come after C, and the threads of j and of the
  member before it begin after C. Sums may have been sent before, but not many. The member two places before j has taken
  two pieces at most, which wait for the one after it, and two more may be under way to it. The member before that one
  has sent these four, holds four of its own, and so on: one h places before it has sent 4 h pieces at most, and has
  added its gradients to two more. Of at most `most` members the first is at most `most` - 3 places before it, a member
  between at most `most` - 4. What is left after C is what the rows count: of an uplink, a downlink, a disk, the thread
  of the sums. The member beside the last has nothing before C, wherever j is: to it all rows apply that hold after C_i.
- *There and back.* The first piece leaves the first member after C_0, with its gradients added, and reaches the last
  one and the one beside it only through all between. Then their uplinks have everything before them that they carry.
  After that the last piece's mean travels back to the first member through all between. Each hop takes both latencies
  and the piece's bytes over the sender's uplink. And piece p+2 begins to travel only once piece p has arrived: pieces
  of one parity come one after the other, each with its latencies.

**Divisions** (`DivisionBounds`): which members hold which layers, in the order of the layers. For stages s … S-1 of it,
two times are bounded from below, from the last stage down; M are the micro-batches of a step, and message(s → s+1) is
the time of a message on the links, latencies included.

- `pass`: from when the activations of a micro-batch have arrived at s until s has handed their gradients over. What is
  between is all of the stage's own forward, and of its backward, and both messages and the pass of the stages above.
- `step`: from when the first activations have arrived at s (for the first stage: from the beginning) until s has handed
  the last gradients over (for the first stage: until the end), with the time in which members tell one another that
  they are done.

A step takes at least the step of the stages above with both messages, after a forward and before a backward of s. And s
itself is at work: in turns each micro-batch takes `seconds`, which no plan undercuts, and at least all of its operators
and the pass above it; ahead each takes `seconds` and those of a forward alone. Of the first and the last micro-batch
only the operators count that run after activations have arrived, and before gradients are handed over.

Where there are too many sets of members to look at, the bounds forget who holds the layers above (state-space
relaxation): whoever does has the most memory that any device of a profile has, and the best link of all. Divisions are
then some of them, by a beam search among the fastest members and the ones with most memory.

Numbers in brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from tightfit.planner.fleet.clock import HEADER, SumStation, copy_seconds, disk_seconds, whole_update_seconds
from tightfit.planner.fleet.part_plans import Layers, StagePlans
from tightfit.planner.fleet.schema import Link

Role = Literal["first", "between", "beside", "last"]
"""beside: right before the last, and not the first; between: before that, and not the first"""
HELD = 4
"""pieces that a member holds at most while it waits for the one after it: two that it sends and two that have
arrived
"""
TAKEN = 2
"""pieces that it has then added its gradients to without having sent them"""
MOST_SETS = 500_000
"""sets of members, times kinds of members, times the square of the places of cuts: with more, bounds forget who holds
the layers above. Each takes some microseconds
"""
REACH, BEAM = 3, 8
"""then: so many of the fastest members, and of those with most memory, may hold the next stage; so many beginnings go
on
"""

# --- the sum ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Seconds beyond a moment: a constant, and so many for each micro-batch of the member."""

    fixed: float
    each: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Lower bounds on the makespan for a member in a role."""

    own: list[Row]
    """beyond the moment at which it has computed"""
    common: list[Row]
    """beyond the moment at which the last member has computed"""
    turning: float
    """beside and last: seconds beyond that moment until the last mean has left from here towards the first"""
    turned: float
    """the same beyond the moment at which the first piece has left the member before"""
    there: Row
    """all but the last: from when the first piece has left the member before, or the first has computed, until it has
    left from here
    """
    back: float
    """all but the last: from when the last mean has left the member after until it has left from here, or the first is
    done
    """


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a member may find around it, whoever the others are."""

    pieces: Sequence[int]
    most: int
    """members of the chain, at most"""
    latency_seconds: float
    """the lowest of another member"""


def terms(station: SumStation, role: Role, around: Surroundings) -> Terms:
    """The bounds for `station`, whose `computed_seconds` and `slots` are not used."""
    pieces, link = around.pieces, station.link
    count, total, begin, end = len(pieces), sum(pieces), pieces[0], pieces[-1]
    hop = link.latency_seconds + around.latency_seconds
    update = whole_update_seconds(station, pieces)
    up, down = 1 / link.up_bytes_per_second, 1 / link.down_bytes_per_second
    paced = max(sum(pieces[parity::2]) * down + len(pieces[parity::2]) * hop for parity in (0, 1))
    """until all pieces of one pass have arrived here, one after the other of each parity"""
    writes = disk_seconds(station.write, total, count) if station.gradients == "disk" else 0.0

    def sums(begins: float, added: int = 0) -> list[Row]:
        """Of the thread of the sums and of the disk, where so many pieces have been added to before."""
        left = pieces[added:]
        reading = disk_seconds(station.read, sum(left), len(left)) if station.gradients == "disk" else 0.0
        adding = reading + copy_seconds(sum(left))
        sending = end * up if left else 0.0
        if role == "first":
            return [Row(begins + adding + sending + update), Row(reading + writes + update)]
        return [Row(begins + sending + update, adding), Row(writes + update, reading)]

    def early(places: int) -> tuple[int, int]:
        """Pieces sent, and added, before C by a member so many places before j, at most."""
        return (HELD * (places - 2), HELD * (places - 2) + TAKEN) if places >= 2 else (0, 0)

    header, latency = HEADER * hop, link.latency_seconds
    adding = copy_seconds(begin) + (disk_seconds(station.read, begin) if station.gradients == "disk" else 0.0)
    if role == "last":
        arrives = 2 * header + begin * down + hop
        passed = arrives + total * up
        common = [
            Row(passed + update),
            Row(2 * header + total * down + hop + end * up + update),
            Row(2 * header + paced + end * up + update),
            *sums(arrives),
        ]
        return Terms(
            own=[],
            common=common,
            turning=passed + latency,
            turned=latency + total * up + latency,
            there=Row(0.0),
            back=0.0,
        )
    if role == "first":
        sent, added = early(around.most - 1)
        back = 2 * hop + end * down
        # Of the header's ways after C, this member's link is sure to be part of the last one only.
        opens = 2 * header if around.most == 2 else header
        own = [Row(header + total * up + back + update), *sums(header)]
        common = [
            Row(sum(pieces[sent:]) * up + (back if sent < count else 0.0) + update),
            Row(opens + total * down + hop + update),
            Row(opens + paced + update),
            *sums(header if around.most == 2 else 0.0, added),
        ]
        there = Row(header + adding + begin * up + latency)
        return Terms(own=own, common=common, turning=0.0, turned=0.0, there=there, back=latency + update)
    there, back = Row(begin * up + 2 * latency, adding), end * up + 2 * latency
    after = [Row(paced + end * up + update)]
    if role == "beside":
        arrives = header + begin * down + hop
        passed = arrives + 2 * total * up
        common = [
            Row(passed + update),
            Row(header + 2 * total * down + hop + end * up + update),
            *after,
            *sums(arrives),
        ]
        return Terms(
            own=[],
            common=common,
            turning=passed + latency,
            turned=latency + 2 * total * up + latency,
            there=there,
            back=back,
        )
    arrives = 2 * header + begin * down + hop
    own = [
        Row(arrives + 2 * total * up + update),
        Row(2 * header + 2 * total * down + hop + end * up + update),
        *sums(arrives),
    ]
    sent, added = early(around.most - 2)
    received, _ = early(around.most - 1)
    common = [
        Row((total + sum(pieces[sent:])) * up + update),
        Row((total + sum(pieces[received:])) * down + hop + end * up + update),
        *after,
        *sums(0.0, added),
    ]
    return Terms(own=own, common=common, turning=0.0, turned=0.0, there=there, back=back)


def role_of(place: int, members: int) -> Role:
    """The role at a place of a chain of so many members."""
    if place == members - 1:
        return "last"
    if not place:
        return "first"
    return "beside" if place == members - 2 else "between"


def least_sum_seconds(computed: Sequence[float], micro_batches: Sequence[int], chain: Sequence[Terms]) -> float:
    """A lower bound on the makespan of a chain whose members have computed at these moments."""
    latest = max(computed)
    result = 0.0
    there = back = 0.0
    for at, (done, count, one) in enumerate(zip(computed, micro_batches, chain)):
        result = max(result, *(latest + row.fixed + row.each * count for row in one.common))
        result = max([result, *(done + row.fixed + row.each * count for row in one.own)])
        if role_of(at, len(chain)) in ("beside", "last"):
            result = max(result, latest + one.turning + back, computed[0] + there + one.turned + back)
        there += one.there.fixed + one.there.each * count
        back += one.back
    return result


# --- divisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A device that may hold a stage."""

    name: str
    plans: StagePlans
    """shared by devices of the same profile"""
    budget_bytes: int
    link: Link

    @property
    def kind(self) -> tuple[int, int, Link]:
        """Two of one kind can change places without changing anything."""
        return id(self.plans), self.budget_bytes, self.link


class Held(NamedTuple):
    """A stage: a candidate, by its number, and the layers that it holds."""

    candidate: int
    first: int
    last: int

    @property
    def layers(self) -> Layers:
        return self.first, self.last


Division = tuple[Held, ...]


class Least(NamedTuple):
    """Seconds that the stages from one on take at least."""

    one_pass: float
    step: float


_Table = dict[tuple[frozenset[int], int], Least]
"""by members, and by the one of them that holds the lowest layers"""


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """Seconds of a stage."""

    alone: float
    """operators of the forward alone"""
    forward: float
    """operators of the forward of training"""
    backward: float
    micro_batch: float
    """no plan's training schedule undercuts it"""
    ahead: float
    """no plan's forward alone undercuts it"""


class DivisionBounds:
    """Bounds by what is known of the members' stages when it is made."""

    def __init__(self, candidates: Sequence[Candidate], micro_batches: int) -> None:
        self.candidates, self.micro_batches = candidates, micro_batches
        plans = candidates[0].plans
        self.layers = plans.layers
        self.places = [0, *sorted(plans.cuts)]
        self._figures: dict[Held, _Figures] = {}

    # --- one division ----------------------------------------------------------------------------------------------

    def bound(self, division: Division) -> float:
        """Seconds that a step of this division takes at least."""
        above: Least | None = None
        for at in reversed(range(len(division))):
            following = division[at + 1].candidate if above else None
            taken = {held.candidate for held in division[at:]}
            above = self._least(division[at], following, above, taken)
        assert above is not None
        return above.step

    def _least(self, held: Held, following: int | None, above: Least | None, taken: set[int]) -> Least:
        """Of a stage and those above it, the next of which is on candidate `following`; they are on `taken`."""
        figures, many = self._of(held), self.micro_batches
        if figures.micro_batch == math.inf:
            return Least(math.inf, math.inf)
        operators = figures.forward + figures.backward
        whole = not held.first
        # (42) to (44) of the last stage, which waits for none above
        if above is None or following is None:
            return Least(operators, _repeated(figures.micro_batch, operators, many, whole=whole))
        there = self._message(held.candidate, following, self._up(held))
        back = self._message(following, held.candidate, self._down(held))
        least_forward = min(figures.alone, figures.forward)
        # (42) a micro-batch passes through the stages above between the forward and the backward of this one
        beyond = there + above.one_pass + back
        one_pass = least_forward + beyond + figures.backward
        # (43) the stage at work, in turns or ahead
        in_turns = _repeated(max(figures.micro_batch, operators + beyond), operators + beyond, many, whole=whole)
        ahead = many * (figures.micro_batch + figures.ahead)
        if not whole:
            ahead += figures.alone + operators - figures.micro_batch - figures.ahead
        # (44) the stages above take their step between the first forward and the last backward of this one
        told = 2 * (self._latency(held.candidate) + self._latency(following))
        path = least_forward + there + above.step + back + figures.backward + told
        # Each member tells one other at least.
        at_work = min(in_turns, ahead) + 2 * sum(map(self._latency, taken))
        return Least(one_pass, max(path, at_work))

    def _of(self, held: Held) -> _Figures:
        if held not in self._figures:
            one = self._members[held.candidate]
            room = one.plans.room(held.layers, one.budget_bytes, 0)
            alone, forward, backward = one.plans.operators(held.layers)
            self._figures[held] = _Figures(
                alone=alone,
                forward=forward,
                backward=backward,
                micro_batch=one.plans.bound(held.layers, room),
                ahead=one.plans.forward_bound(held.layers, room),
            )
        return self._figures[held]

    def _up(self, held: Held) -> int:
        return self._members[held.candidate].plans.up_bytes[held.last]

    def _down(self, held: Held) -> int:
        return self._members[held.candidate].plans.down_bytes[held.last]

    def _latency(self, member: int) -> float:
        return self._members[member].link.latency_seconds

    def _message(self, source: int, target: int, size: int) -> float:
        one, other = self._members[source].link, self._members[target].link
        rate = min(one.up_bytes_per_second, other.down_bytes_per_second)
        return size / rate + one.latency_seconds + other.latency_seconds

    # --- all divisions ---------------------------------------------------------------------------------------------

    @property
    def least(self) -> float:
        """Seconds that a step of any division takes at least."""
        return min((one.step for one in self._above[0].values()), default=math.inf)

    def divisions(self) -> Iterator[tuple[float, Division]]:
        """All divisions that may fit, or some where there are too many, with their bounds, which do not fall."""
        if not self.exact:
            yield from self._beam()
            return
        numbers = itertools.count()
        heap: list[tuple[float, int, Division]] = [(0.0, next(numbers), ())]
        while heap:
            bound, _, begun = heapq.heappop(heap)
            if begun and begun[-1].last == self.layers:
                yield bound, begun
                continue
            for longer in self._longer(begun):
                least = self._completed(longer)
                if least < math.inf:
                    heapq.heappush(heap, (least, next(numbers), longer))

    def _beam(self) -> Iterator[tuple[float, Division]]:
        """Of the divisions that have begun with equally many stages, those with the lowest bounds go on."""
        begun: list[Division] = [()]
        whole: list[tuple[float, Division]] = []
        while begun:
            bounds = ((self._completed(longer), longer) for one in begun for longer in self._longer(one))
            listed = sorted((least, longer) for least, longer in bounds if least < math.inf)
            whole += [(least, one) for least, one in listed if one[-1].last == self.layers]
            begun = [one for _, one in listed if one[-1].last < self.layers][:BEAM]
        yield from sorted(whole)

    def _longer(self, begun: Division) -> Iterator[Division]:
        first = begun[-1].last if begun else 0
        later = [last for last in (*self.places, self.layers) if last > first]
        for candidate in self._within_reach({held.candidate for held in begun}, Held(0, first, later[0])):
            for last in later:
                yield (*begun, Held(candidate, first, last))

    def _within_reach(self, taken: set[int], least: Held) -> Iterator[int]:
        """The candidates that may hold the next stage, which has the layers of `least` or more."""
        if self.exact:
            yield from self._next(taken, range(len(self.candidates)))
            return
        found: set[int] = set()
        for order in self._orders:
            holding = (
                one
                for one in self._next(taken, order)
                if self._of(least._replace(candidate=one)).micro_batch < math.inf
            )
            found.update(itertools.islice(holding, REACH))
        yield from sorted(found)

    @cached_property
    def _orders(self) -> tuple[list[int], list[int]]:
        """The candidates from the fastest on, a message counted in, and from the one with most memory on."""

        def seconds(at: int) -> float:
            plans, link = self.candidates[at].plans, self.candidates[at].link
            sent = max(plans.up_bytes.values()) / link.up_bytes_per_second
            received = max(plans.down_bytes.values()) / link.down_bytes_per_second
            return sum(plans.operators((0, self.layers))) + sent + received + 2 * link.latency_seconds

        numbers = range(len(self.candidates))
        return sorted(numbers, key=seconds), sorted(numbers, key=lambda at: -self.candidates[at].budget_bytes)

    def _next(self, taken: set[int], order: Sequence[int]) -> Iterator[int]:
        """The members that are left; of those of one kind, the first in `order`."""
        seen = set()
        for one in order:
            if one not in taken and (kind := self._kinds[one]) not in seen:
                seen.add(kind)
                yield one

    @cached_property
    def _kinds(self) -> list[tuple[int, int, Link]]:
        return [one.kind for one in self._members]

    @cached_property
    def exact(self) -> bool:
        """Whether the candidates are few enough for bounds that know which of them hold the layers above."""
        stages = len(self.places)
        kinds = Counter(one.kind for one in self.candidates)
        sets = [1] + [0] * stages  # by their size
        for many in kinds.values():
            sets = [sum(sets[max(0, size - many) : size + 1]) for size in range(stages + 1)]
            if sum(sets) * len(kinds) * stages**2 > MOST_SETS:
                return False
        return True

    @cached_property
    def _members(self) -> Sequence[Candidate]:
        """The candidates, and where these are too many, behind them for each profile one that none of them
        surpasses.
        """
        if self.exact:
            return self.candidates
        links = [one.link for one in self.candidates]
        link = Link(
            up_bytes_per_second=max(one.up_bytes_per_second for one in links),
            down_bytes_per_second=max(one.down_bytes_per_second for one in links),
            latency_seconds=min(one.latency_seconds for one in links),
        )
        most: dict[int, Candidate] = {}
        for one in sorted(self.candidates, key=lambda one: one.budget_bytes):
            most[id(one.plans)] = replace(one, link=link)
        return [*self.candidates, *most.values()]

    def _completed(self, begun: Division) -> float:
        """The bound of the best division that begins like this."""
        if begun[-1].last == self.layers:
            return self.bound(begun)
        taken = {held.candidate for held in begun}
        best = math.inf
        for (members, following), least in self._above[begun[-1].last].items():
            if taken & members:
                continue
            above, beyond = least, following
            for at in reversed(range(len(begun))):
                held = begun[at]
                above = self._least(held, beyond, above, {*members, *(one.candidate for one in begun[at:])})
                beyond = held.candidate
            best = min(best, above.step)
        return best

    @cached_property
    def _above(self) -> dict[int, _Table]:
        """By a stage's first layer, then by the members that hold it and all above, and by the one that holds it, what
        they take at least: each time on its own, as it may be of other cuts. Where members are too many, whoever they
        are.
        """
        result: dict[int, _Table] = {}
        many = len(self.candidates)
        order = range(many)[::-1] if self.exact else range(many, len(self._members))
        for first in reversed(self.places):
            table: _Table = {}
            for candidate in self._next(set(), order):
                found = self._least(Held(candidate, first, self.layers), None, None, {candidate})
                self._note(table, frozenset({candidate}), candidate, found)
            for last in (place for place in self.places if place > first):
                for (members, following), above in result[last].items():
                    for candidate in self._next(set(members), order):
                        taken = members | {candidate}
                        found = self._least(Held(candidate, first, last), following, above, set(taken))
                        self._note(table, taken, candidate, found)
            result[first] = table
        return result

    def _note(self, table: _Table, members: frozenset[int], candidate: int, found: Least) -> None:
        """Keep the least of each time."""
        key = (members, candidate) if self.exact else (frozenset(), len(self.candidates))
        known = table.get(key, Least(math.inf, math.inf))
        least = Least(min(found.one_pass, known.one_pass), min(found.step, known.step))
        if least.step < math.inf:
            table[key] = least


def _repeated(seconds: float, least: float, times: int, *, whole: bool) -> float:
    """Of so many schedules one after the other; unless `whole`, only `least` of the first and of the last one
    counts.
    """
    if whole:
        return times * seconds
    return least if times == 1 else (times - 2) * seconds + 2 * least
