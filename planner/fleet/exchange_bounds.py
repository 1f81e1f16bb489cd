"""What every step of a fleet takes beyond its computation: lower bounds that are linear in the micro-batches.

Everything here is proven of the clock in `exchange`, for a member i of the chain 0 … n-1. C_i is when i has computed,
C the latest of these, and j a member with C_j = C. P are the bytes of all pieces, U_i the whole update of i, which
begins when i has all means and has passed all pieces on.

**Own rows** (after C_i). Before C_i no thread of i runs and no piece is under way to it. So after C_i its uplink and its
downlink carry everything that passes over them (P at the ends, 2 P between), its disk reads the gradients of all slots
and writes all means, and the thread of the sums adds to one piece after the other, and sends the last. That thread
begins once a header has come, but to the first, and has been passed on. Then comes U_i.

**Common rows** (after C). No header passes j before C, so all means come after C, and the threads of j and of the member
before it begin after C. Sums may have been sent before, but not many. The member two places before j has taken two
pieces at most, which wait for the one after it, and two more may be under way to it. The member before that one has
sent these four, holds four of its own, and so on: one h places before it has sent 4 h pieces at most, and has added its
gradients to two more. Of at most `most` members the first is at most `most` - 3 places before it, a member between at
most `most` - 4. What is left after C is what the rows count: of an uplink, a downlink, a disk, the thread of the sums.
The member beside the last has nothing before C, wherever j is: to it all rows apply that hold after C_i.

**There and back.** The first piece leaves the first member after C_0, with its gradients added, and reaches the last one
and the one beside it only through all between. Then their uplinks have everything before them that they carry. After
that the last piece's mean travels back to the first member through all between. Each hop takes both latencies and the
piece's bytes over the sender's uplink. And piece p+2 begins to travel only once piece p has arrived: pieces of one
parity come one after the other, each with its latencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tightfit.planner.fleet.exchange import HEADER, Station, copy_seconds, transfer_seconds, whole_update_seconds

Role = Literal["first", "between", "beside", "last"]
"""beside: right before the last, and not the first; between: before that, and not the first"""
HELD = 4
"""pieces that a member holds at most while it waits for the one after it: two that it sends and two that have arrived"""
TAKEN = 2
"""pieces that it has then added its gradients to without having sent them"""


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
    """all but the last: from when the first piece has left the member before, or the first has computed, until it has left
    from here"""
    back: float
    """all but the last: from when the last mean has left the member after until it has left from here, or the first is done
    """


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a member may find around it, whoever the others are."""

    pieces: Sequence[int]
    most: int
    """members of the chain, at most"""
    latency_seconds: float
    """the lowest of another member"""


def terms(station: Station, role: Role, around: Surroundings) -> Terms:
    """The bounds for `station`; of it `computed_seconds` is not used, and `slots` counts for the first only."""
    pieces, link = around.pieces, station.link
    count, total, begin, end = len(pieces), sum(pieces), pieces[0], pieces[-1]
    hop = link.latency_seconds + around.latency_seconds
    update = whole_update_seconds(station, pieces)
    up, down = 1 / link.up_bytes_per_second, 1 / link.down_bytes_per_second
    paced = max(sum(pieces[parity::2]) * down + len(pieces[parity::2]) * hop for parity in (0, 1))
    """until all pieces of one pass have arrived here, one after the other of each parity"""
    writes = transfer_seconds(station.write, total, count) if station.gradients == "disk" else 0.0

    def sums(begins: float, added: int = 0) -> list[Row]:
        """Of the thread of the sums and of the disk, where so many pieces have been added to before."""
        left = pieces[added:]
        reading = transfer_seconds(station.read, sum(left), len(left)) if station.gradients == "disk" else 0.0
        adding = reading + copy_seconds(sum(left))
        sending = end * up if left else 0.0
        if role == "first":
            return [Row(begins + adding + sending + update), Row(reading + writes + update)]
        return [Row(begins + sending + update, adding), Row(writes + update, reading)]

    def early(places: int) -> tuple[int, int]:
        """Pieces sent, and added, before C by a member so many places before j, at most."""
        return (HELD * (places - 2), HELD * (places - 2) + TAKEN) if places >= 2 else (0, 0)

    header, latency = HEADER * hop, link.latency_seconds
    adding = copy_seconds(begin) + (transfer_seconds(station.read, begin) if station.gradients == "disk" else 0.0)
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


def least_seconds(computed: Sequence[float], micro_batches: Sequence[int], chain: Sequence[Terms]) -> float:
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
