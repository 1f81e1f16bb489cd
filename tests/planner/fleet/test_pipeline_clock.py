"""The clock of a pipeline: steps that can be worked out by hand, and what holds for all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.planner.fleet.clock import Marks, Station, agree, closing_seconds, play, turns
from tightfit.planner.fleet.schema import Link

MESSAGE = 1000
"""bytes, which take a second at 1000 bytes per second"""


def link(rate=1e12, latency=0.0):
    return Link(up_bytes_per_second=rate, down_bytes_per_second=rate, latency_seconds=latency)


def station(forward, backward, *, ahead=0, first=False, last=False, on=None, alone=None):
    """A stage that receives first and sends at the end of its forward and of its backward."""
    whole = forward + backward
    alone = forward if alone is None else alone
    return Station(
        train=Marks(
            send_up=0.0 if last else forward,
            receive_down=0.0 if last else forward,
            send_down=0.0 if first else whole,
            middle=forward,
            seconds=whole,
        ),
        forward=Marks(send_up=0.0 if last else alone, middle=alone, seconds=alone),
        ahead=ahead,
        link=on or link(),
        up_bytes=0 if last else MESSAGE,
        down_bytes=0 if first else MESSAGE,
    )


def pair(ahead, on=None):
    return [station(1.0, 2.0, ahead=ahead, first=True, on=on), station(1.5, 2.5, last=True, on=on)]


def test_in_turns_nobody_computes_beside_another():
    assert play(pair(0), 4).makespan == pytest.approx(4 * (1.0 + 4.0 + 2.0))


def test_ahead_both_compute():
    # The last stage waits for one forward and is then busy for all micro-batches; then there is one backward.
    assert play(pair(2), 4).makespan == pytest.approx(1.0 + 4 * 4.0 + 2.0)


def test_a_stage_that_is_busy_goes_forward_twice():
    slow = [station(3.0, 3.0, ahead=2, first=True), station(1.0, 1.0, last=True)]
    assert play(slow, 4).makespan == pytest.approx(4 * 9.0)


def test_messages_take_their_time():
    slow = play(pair(0, link(1000.0, 0.25)), 3)
    # There and back: a second of bytes and two latencies each; at the end both tell one another that they are done.
    assert slow.makespan == pytest.approx(3 * (7.0 + 2 * 1.5) + closing_seconds([link(latency=0.25)] * 2))
    assert closing_seconds([link(latency=0.25)] * 3) == pytest.approx(2.0)


def test_a_message_waits_for_a_buffer():
    """Three forwards ahead: the third message is made at 3 s, when the first is still on its way."""
    slow = [station(1.0, 1.0, ahead=3, first=True, on=link(200.0)), station(0.1, 0.1, last=True, on=link(200.0))]
    sends = [one for one in play(slow, 3).doings if one.what == "send" and one.station == 0]
    assert [one.begin for one in sends] == pytest.approx([1.0, 6.0, 11.0])
    forwards = [one for one in play(slow, 3).doings if one.what == "forward" and one.station == 0]
    assert forwards[-1].end == pytest.approx(6.0)  # it waited from 3 s on


def test_the_order_of_schedules():
    assert list(turns(0, 2)) == [("train", 0), ("train", 1)]
    assert list(turns(1, 3)) == [
        ("forward", 0), ("train", 0), ("forward", 1), ("train", 1), ("forward", 2), ("train", 2),
    ]  # fmt: skip
    assert list(turns(9, 2)) == [("forward", 0), ("forward", 1), ("train", 0), ("train", 1)]


def test_stages_that_would_wait_for_ever():
    assert agree((3, 3, 1, 0))
    assert agree((0, 1, 0))
    assert not agree((1, 2, 0))
    assert not agree((0, 2, 0))


@given(
    aheads=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(lambda one: agree([*one, 0])),
    seconds=st.lists(st.floats(0.01, 3.0), min_size=8, max_size=8),
    rate=st.sampled_from([300.0, 3000.0, 1e9]),
    micro_batches=st.integers(1, 5),
)
def test_every_step_ends(aheads, seconds, rate, micro_batches):
    count = len(aheads) + 1
    stations = [
        station(
            seconds[at],
            seconds[4 + at],
            ahead=min(ahead, micro_batches),
            first=not at,
            last=at == count - 1,
            on=link(rate, 0.01),
        )
        for at, ahead in enumerate([*aheads, 0])
    ]
    told = play(stations, micro_batches)
    backward = {(one.station, one.number) for one in told.doings if one.what == "backward"}
    assert backward == {(at, number) for at in range(count) for number in range(micro_batches)}
    for at, one in enumerate(stations):
        work = micro_batches * (one.train.seconds + (one.forward.seconds if one.ahead else 0.0))
        assert told.makespan >= work - 1e-9, at
    on_wire = [one for one in told.doings if one.what == "send"]
    assert len(on_wire) == 2 * (count - 1) * micro_batches
