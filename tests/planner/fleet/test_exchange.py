"""The clock, against schedules counted by hand, and the bounds, against the clock."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.planner.fleet.bounds import Surroundings, least_sum_seconds, role_of, terms
from tightfit.planner.fleet.clock import CHECKED_BYTES_PER_SECOND, SumStation, play_sum
from tightfit.planner.fleet.schema import Link
from tightfit.profiles.schema import Channel

DISK = Channel(bytes_per_second=1e3, latency_seconds=0.0)
ABOUT = 1e-5
"""relative: adding a few bytes in memory, and the checksum, take some too, which no count by hand below has"""


def station(computed=0.0, *, up=1e3, down=1e3, latency=0.0, **changes):
    """A member whose links carry a piece of 1000 bytes in a second."""
    values = {
        "computed_seconds": computed,
        "link": Link(up_bytes_per_second=up, down_bytes_per_second=down, latency_seconds=latency),
        "slots": 1,
        "gradients": "memory",
        "states": "memory",
        "update_seconds": 0.0,
        "read": DISK,
        "write": DISK,
    }
    return SumStation(**values | changes)


def seconds(stations, pieces):
    return play_sum(stations, pieces).makespan


def test_two_members_send_both_ways_at_once():
    # sums 0-1, 1-2, 2-3; the mean of each comes back in the second after
    assert seconds([station(), station()], [1000] * 3) == pytest.approx(4.0, rel=ABOUT)


def test_an_update_follows_the_last_piece():
    # The mean is back at 2; the last has passed it on by then.
    assert seconds([station(update_seconds=0.5), station(update_seconds=2.0)], [1000]) == pytest.approx(4.0, rel=ABOUT)
    assert seconds([station(update_seconds=2.5), station(update_seconds=2.0)], [1000]) == pytest.approx(4.5, rel=ABOUT)


def test_the_member_between_sends_everything_twice():
    # Sums reach it at 1 and 2 and leave it until 2 and 3; the means come at 3 and 4 and leave until 4 and 5.
    assert seconds([station()] * 3, [1000] * 2) == pytest.approx(5.0, rel=ABOUT)


def test_the_slower_end_of_a_link_counts():
    slow_down = [station(), station(down=500)]
    assert seconds(slow_down, [1000] * 2) == pytest.approx(5.0, rel=ABOUT)  # 0-2, 2-4, and 4-5 back
    slow_up = [station(), station(up=250)]
    assert seconds(slow_up, [1000] * 2) == pytest.approx(9.0, rel=ABOUT)  # 0-1, and back 1-5, 5-9


def test_a_slow_receiver_leaves_the_uplink_to_others():
    # Member 1 begins to send the second piece to the slow 2 at 11. It is there at 21, but the uplink is free at 12,
    # when the mean of the first piece comes.
    chain = [station(), station(), station(down=100)]
    back = [doing.begin for doing in play_sum(chain, [1000] * 2).doings if (doing.station, doing.to) == (1, 0)]
    assert back == pytest.approx([12.0, 22.0], rel=ABOUT)


def test_nothing_begins_before_both_have_computed():
    assert seconds([station(3.0), station(7.0)], [1000]) == pytest.approx(9.0, rel=ABOUT)
    assert seconds([station(7.0), station(3.0)], [1000]) == pytest.approx(9.0, rel=ABOUT)


def test_headers_pass_before_pieces_and_two_pieces_are_under_way():
    # A hop takes a second. Headers: there 0-2, back 2-4, for which the first waits until 2, and the last until 4.
    # Pieces take no time but the hop. The first two sums leave at 4, when the last can take them, and arrive at 5; the
    # next two leave then and arrive at 6, and their means at 7.
    hop = [station(latency=0.5)] * 2
    assert seconds(hop, [1e-6] * 4) == pytest.approx(7.0, rel=ABOUT)
    assert seconds(hop, [1e-6] * 2) == pytest.approx(6.0, rel=ABOUT)
    assert seconds(hop, [1e-6] * 5) == pytest.approx(8.0, rel=ABOUT)


def test_gradients_on_disk_are_read_before_they_are_added_and_means_are_written():
    fast = {"up": 1e12, "down": 1e12}
    chain = [station(**fast), station(**fast, slots=3, gradients="disk")]
    # Per piece three reads of a second and a write of a second; then the update reads both means.
    assert seconds(chain, [1000] * 2) == pytest.approx(2 * (3 + 1) + 2, rel=ABOUT)


def test_states_on_disk_are_read_and_written_back():
    fast = {"up": 1e12, "down": 1e12}
    chain = [station(**fast), station(**fast, states="disk", update_seconds=0.25)]
    assert seconds(chain, [1000] * 3) == pytest.approx(3 * 4 + 0.25, rel=ABOUT)


def test_the_checksum_is_part_of_the_update():
    fast = {"up": 1e15, "down": 1e15}
    size = int(CHECKED_BYTES_PER_SECOND)
    told = play_sum([station(**fast)] * 2, [size])
    assert told.updated[0] - told.exchanged[0] == pytest.approx(1.0)


def test_every_piece_passes_every_link_once_each_way_in_order():
    chain = [station(0.1 * n, up=700 + 100 * n, latency=0.01 * n) for n in range(4)]
    pieces = [300, 1000, 20, 500, 700]
    sent = [doing for doing in play_sum(chain, pieces).doings if doing.what == "send"]
    ways = {(doing.station, doing.to) for doing in sent}
    assert ways == {(0, 1), (1, 2), (2, 3), (3, 2), (2, 1), (1, 0)}
    for source, target in ways:
        own = [doing for doing in sent if (doing.station, doing.to) == (source, target)]
        rate = min(chain[source].link.up_bytes_per_second, chain[target].link.down_bytes_per_second)
        assert [round((doing.end - doing.begin) * rate) for doing in own] == pieces
        assert all(before.end <= after.begin for before, after in itertools.pairwise(own))


rates = st.sampled_from((1e4, 1e5, 3e5, 1e6))
channels = st.builds(Channel, bytes_per_second=rates, latency_seconds=st.sampled_from((0.0, 1e-3, 0.05)))
shelves = st.sampled_from(("memory", "disk"))
stations = st.builds(
    SumStation,
    computed_seconds=st.sampled_from((1.0, 1.0, 1.2, 2.0, 5.0)),
    link=st.builds(
        Link, up_bytes_per_second=rates, down_bytes_per_second=rates, latency_seconds=st.sampled_from((0.0, 1e-3, 0.05))
    ),
    slots=st.integers(1, 9),
    gradients=shelves,
    states=shelves,
    update_seconds=st.sampled_from((0.0, 0.1, 2.0)),
    read=channels,
    write=channels,
)


@given(
    st.lists(stations, min_size=2, max_size=6),
    st.lists(st.integers(1, 50_000), min_size=1, max_size=24),
    st.integers(0, 3),
)
def test_no_step_is_shorter_than_its_bounds(chain, pieces, more):
    """`more`: members that the bounds have to allow for and that are not there."""
    chain[0] = replace(chain[0], slots=1)
    told = []
    for at, one in enumerate(chain):
        others = min(other.link.latency_seconds for there, other in enumerate(chain) if there != at)
        around = Surroundings(pieces=pieces, most=len(chain) + more, latency_seconds=others)
        told.append(terms(one, role_of(at, len(chain)), around))
    least = least_sum_seconds([one.computed_seconds for one in chain], [one.slots for one in chain], told)
    assert least <= seconds(chain, pieces) * (1 + 1e-9)


def bounded(chain, pieces):
    """The lower bound on a step of just these members."""
    told = []
    for at, one in enumerate(chain):
        others = min(other.link.latency_seconds for there, other in enumerate(chain) if there != at)
        around = Surroundings(pieces=pieces, most=len(chain), latency_seconds=others)
        told.append(terms(one, role_of(at, len(chain)), around))
    return least_sum_seconds([one.computed_seconds for one in chain], [one.slots for one in chain], told)


@pytest.mark.parametrize("far", [0, 1, 2])
def test_the_bounds_hold_where_one_member_is_far_away(far):
    """Of the ways of a header some do not touch its link. Its downlink is the narrowest, so that its rows count."""
    chain = [station(5.0 if at == 2 else 1.0, down=1e5, up=1e5) for at in range(3)]
    chain[far] = station(chain[far].computed_seconds, down=1e4, up=1e5, latency=2.0)
    assert bounded(chain, [1000] * 20) <= seconds(chain, [1000] * 20)


def test_the_bounds_are_near_where_links_are_busy():
    """Sixty-four pieces through four equal members, which have computed at the same time."""
    chain, pieces = [station(10.0, latency=1e-3)] * 4, [1000] * 64
    assert seconds(chain, pieces) - 10.0 <= 1.02 * (bounded(chain, pieces) - 10.0)
