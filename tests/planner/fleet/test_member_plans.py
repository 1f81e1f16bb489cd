"""Members' own plans: derived profiles, memory for the exchange, and one planner for all shelves."""

from __future__ import annotations

import math

import pytest
from synthetic import MIB, small_chain

from tightfit.planner.fleet.part_plans import MemberPlans
from tightfit.planner.fleet.part_profiles import (
    alone_profile,
    exchange_bytes,
    member_profile,
    micro_batch_seconds,
    pieces_of,
    update_seconds,
)
from tightfit.planner.fleet.schema import BUFFERS, PIECE_BYTES
from tightfit.planner.plan import planner_of
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.schema import EXCHANGE, Floor, Profile, Tensor

ROOM = 15 * MIB
FLOOR = Floor(import_peak_bytes=0, resident_bytes=0, instruction_bytes=0)


@pytest.fixture(scope="module")
def plans(layers):
    made = MemberPlans(layers(), 1e-3)
    made.plan(ROOM, 30.0)
    return made


def trained(*sizes) -> Profile:
    """A profile that is asked for nothing but its trained tensors."""
    tensors = [
        Tensor(name=f"t{n}", kind="trainable", shape=[1], dtype="float32", bytes=size) for n, size in enumerate(sizes)
    ]
    other = Tensor(name="w", kind="weight", shape=[1], dtype="uint8", bytes=PIECE_BYTES)
    return small_chain(1).model_copy(update={"tensors": [other, *tensors]})


def test_pieces_are_whole_neighbouring_tensors():
    half = PIECE_BYTES // 2
    assert pieces_of(trained(half, half)) == (PIECE_BYTES,)
    assert pieces_of(trained(half, half, 4)) == (PIECE_BYTES, 4)
    assert pieces_of(trained(half, half + 4, half - 4)) == (half, PIECE_BYTES)
    assert pieces_of(trained(4, 3 * PIECE_BYTES, 4, 4)) == (4, 3 * PIECE_BYTES, 8)


def test_memory_for_the_exchange():
    def extra(floor=FLOOR, pieces=(MIB, MIB), **changes):
        return exchange_bytes(floor, pieces, **{"slots": 3, "gradients": "disk", "states": "disk"} | changes)

    lean = extra()
    assert lean >= FLOOR.transport_bytes + BUFFERS * MIB
    assert extra(gradients="memory") == lean + 3 * 2 * MIB
    assert extra(gradients="memory", slots=1) == lean + 2 * MIB
    assert extra(states="memory") == lean + 2 * 2 * MIB
    measured = FLOOR.model_copy(update={"exchange_bytes": FLOOR.transport_bytes - 5})
    assert extra(measured) == lean - 5
    assert extra(pieces=(2 * MIB, 4)) == lean + BUFFERS * MIB  # the largest piece counts


def test_a_member_hands_gradients_over_and_keeps_no_states(layers):
    profile = layers()
    made = member_profile(profile, 6, 7 * MIB, "memory")
    assert made.optimizer == {"name": EXCHANGE, "state_tensors": 0, "accumulate": 6}
    assert made.device.floor.resident_bytes == profile.device.floor.resident_bytes + 7 * MIB
    assert made.device.floor.start_peak_bytes == profile.device.floor.start_peak_bytes
    kept = [one for one in made.tensors if one.kind != "trainable"]
    assert kept == [one for one in profile.tensors if one.kind != "trainable"]
    Profile.model_validate_json(made.model_dump_json())  # as it can be written down

    def handing_over(shelf):
        return sum(one.update_seconds for one in member_profile(profile, 6, 0, shelf).tensors)

    writing = sum(one.bytes for one in profile.tensors if one.kind == "trainable") * 5e-11
    assert handing_over("disk") - handing_over("memory") == pytest.approx(writing)


def test_an_update_takes_the_same_whatever_number_of_steps_was_measured(layers):
    """As `tightfit.profiles.devices.estimate` counts passes over memory: 7 for an update of one step, of four 3 each
    and another 10.
    """
    one = layers()
    tensors = [
        tensor.model_copy(update={"update_seconds": tensor.update_seconds * (3 + 10 / 4) / 7}) for tensor in one.tensors
    ]
    four = one.model_copy(
        update={"tensors": tensors, "optimizer": {"name": "adamw", "state_tensors": 3, "accumulate": 4}}
    )
    assert update_seconds(four) == pytest.approx(update_seconds(one)) == pytest.approx(4e-4)
    for profile in (one, four):
        assert sum(t.update_seconds for t in alone_profile(profile, 4).tensors) == pytest.approx(
            4e-4 * (3 + 10 / 4) / 7
        )
        assert sum(t.update_seconds for t in alone_profile(profile, 1).tensors) == pytest.approx(4e-4)


@pytest.mark.parametrize("extra", [0, 3 * MIB])
def test_a_higher_floor_is_the_same_as_a_smaller_budget(layers, plans, extra):
    """The plan of the member's own profile, as the planner makes it for that profile alone."""
    whole = planner_of(member_profile(layers(), 5, extra, "memory")).plan(ROOM + extra, gap=1e-3)
    ours = plans.member_plan(ROOM + extra, extra, micro_batches=5, gradients="memory", first=False)
    assert ours.step_seconds == pytest.approx(whole.step_seconds, rel=2e-3)  # both are within the gap of the best
    assert ours.bound_seconds <= whole.step_seconds
    assert whole.bound_seconds <= ours.step_seconds
    for one in (ours, whole):
        found = simulate(one)
        assert one.peak_bytes == found.peak_bytes <= one.budget_bytes == ROOM + extra
        assert one.step_seconds == found.step_seconds
        assert one.optimizer["accumulate"] == 5
    assert ours.floor_bytes == whole.floor_bytes


def test_what_one_room_says_of_others(plans):
    def at(room):
        return [look(room, "memory", first=False) for look in (plans.seconds, plans.hoped, plans.bound)]

    seconds, hoped, bound = at(ROOM)
    assert bound <= seconds == hoped < math.inf
    assert at(ROOM + MIB) == [seconds, 0.0, 0.0]  # the plan fits, and a better one may exist
    smaller = at(ROOM - MIB)
    assert smaller == [math.inf, hoped, bound]
    assert at(0) == [math.inf] * 3


def test_too_little_room_is_remembered(layers):
    plans = MemberPlans(layers(), 1e-3)
    plans.plan(6 * MIB, 30.0)
    for room in (6 * MIB, 5 * MIB):
        assert plans.planned(room)
        assert plans.bound(room, "disk", first=False) == plans.hoped(room, "disk", first=True) == math.inf
    assert not plans.planned(6 * MIB + 1)
    least = plans.least_room(30.0)
    assert least > 6 * MIB
    plans.plan(least, 30.0)
    assert plans.seconds(least, "memory", first=False) < math.inf


def test_the_disk_carries_the_gradients_too(plans):
    """On a disk that writes as slowly as this, a micro-batch takes as long as its gradients are written."""
    made = plans.member_plan(ROOM, 0, micro_batches=2, gradients="disk", first=False)
    write = made.device.write.model_copy(update={"bytes_per_second": 1e6})
    slow = made.model_copy(update={"device": made.device.model_copy(update={"write": write})})
    total = sum(pieces_of(made))
    read = made.train.read_bytes / made.device.read.bytes_per_second
    assert micro_batch_seconds(made, "memory", first=False) == made.step_seconds
    assert micro_batch_seconds(slow, "memory", first=False) == slow.step_seconds
    carried = read + (made.train.write_bytes + total) / 1e6
    assert micro_batch_seconds(slow, "disk", first=False) == pytest.approx(carried)
    reads_back = carried + total / made.device.read.bytes_per_second
    assert micro_batch_seconds(slow, "disk", first=True) == pytest.approx(reads_back)
