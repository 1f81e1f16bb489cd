"""Arenas searched for: tensors cut from a full rectangle of bytes and time, so that a place without a gap is known to
exist.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.problem.step_graph import ALIGNMENT, PACKED_ALIGNMENT, aligned
from tightfit.planner.schedule import arena_placement
from tightfit.planner.schedule.arena import DIRECT_BYTES, arena_of, placed_items
from tightfit.planner.schedule.arena_placement import (
    TensorLifetime,
    _assign,
    _orders,
    _TakenBefore,
    by_groups,
    live_bytes,
    pack,
)
from tightfit.planner.schedule.free_ranges import ENDLESS, top_gap
from tightfit.planner.schedule.lowering import DraftInstruction
from tightfit.planner.search_options import SearchOptions

HEIGHT, LENGTH = 64 << 10, 64


def cut(chance, low, high, first, last):
    """Rectangles (low, high, first, last) that fill the given one."""
    if high - low < 8192 or last - first < 4 or chance.random() < 0.1:
        return [(low, high, first, last)]
    if chance.random() < 0.5:
        at = low + 64 * chance.randrange(8, (high - low) // 64 - 7)
        return [*cut(chance, low, at, first, last), *cut(chance, at, high, first, last)]
    at = chance.randrange(first + 1, last + 1)
    return [*cut(chance, low, high, first, at - 1), *cut(chance, low, high, at, last)]


def layers(seed, count):
    """The same tensors in `count` layers, one layer after the other; every entry is filled to HEIGHT."""
    pieces = cut(random.Random(seed), 0, HEIGHT, 0, LENGTH - 1)
    return [
        TensorLifetime(
            name=f"layers.{layer}.{letter(number)}",
            size=high - low,
            alignment=64,
            spans=[(layer * LENGTH + first, layer * LENGTH + last)],
            makers=[layer * LENGTH + first],
        )
        for layer in range(count)
        for number, (low, high, first, last) in enumerate(pieces)
    ]


def letter(number):
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def apart(items, offsets):
    """Whether no two that are there at the same time overlap."""
    return not any(
        low < high + other.size
        and high < low + one.size
        and any(first <= end and begin <= last for first, last in one.spans for begin, end in other.spans)
        for at, (one, low) in enumerate(zip(items, offsets))
        for other, high in list(zip(items, offsets))[at + 1 :]
    )


def by_rule(items, length):
    heights = []
    for order, tight in _orders(items):
        offsets, failed = _assign(items, order, 0, length, below=ENDLESS, tight=tight)
        assert failed is None
        heights.append(max(offset + item.size for offset, item in zip(offsets, items)))
    return min(heights)


@pytest.mark.parametrize("count", [1, 8])
def test_a_search_finds_lower_arenas_than_the_rules(count):
    """Within 4 % of what is live, where rules leave up to 22 %, for at least four of these seeds."""
    beaten = 0
    for seed in range(14):
        items = layers(seed, count)
        length = count * LENGTH
        assert set(live_bytes(items, length)[:length].tolist()) == {HEIGHT}
        ruled, goal = by_rule(items, length), HEIGHT + HEIGHT // 25
        offsets = by_groups(items, 0, length, goal)
        if offsets is None:
            continue
        height = max(offset + item.size for offset, item in zip(offsets, items))
        assert HEIGHT <= height <= goal
        assert apart(items, offsets)
        beaten += ruled > goal
    assert beaten >= 4


def test_the_solver_finds_places_where_orders_find_none(monkeypatch):
    """Without a gap: in each of these steps, twice the same; orders alone leave some out."""
    steps = [layers(seed, 1) for seed in range(14)]

    def found():
        return [by_groups(items, 0, LENGTH, HEIGHT) for items in steps]

    solved = found()
    assert found() == solved
    for items, offsets in zip(steps, solved):
        assert max(offset + item.size for offset, item in zip(offsets, items)) == HEIGHT
        assert apart(items, offsets)
    monkeypatch.setattr(arena_placement, "SOLVED", 0)
    assert found().count(None) >= 2


def training_step(count, kept, resident, each):
    """Layers that make `kept` on the way forward and need it on the way back, hold `resident` from the way back to the
    next way forward, and in between need all but a 64th of what is left for tensors of a few sizes.
    """
    chance = random.Random(count)
    items = []

    def add(name, size, *spans):
        items.append(TensorLifetime(name=name, size=64 * size, alignment=64, spans=list(spans), makers=[spans[0][0]]))

    end = 2 * count * each - 1
    for layer in range(count):
        forward, backward = layer * each, (2 * count - 1 - layer) * each
        add(f"{layer}.kept", kept, (forward + each - 1, backward))
        add(f"{layer}.resident", resident, (0, forward), (backward + each - 1, end))
        free = 64 * count - kept * (layer + 1) - resident * (count - layer)
        for way in (forward, backward):
            sizes = [free * part // 64 for part in (20, 12, 31)]
            chance.shuffle(sizes)
            for number, size in enumerate(sizes):
                add(f"{layer}.{way}.{number}", size, (way, way + each - 1 if number else way + each // 2))
    return items, end + 1


@pytest.mark.parametrize(("kept", "resident"), [(20, 30), (30, 20), (40, 10), (10, 40)])
def test_a_stack_and_its_mirror_image_leave_one_gap(kept, resident):
    """What grows while the other shrinks lies at the two ends: within 2.5 % of what is live, where rules lose 7 to 15
    %.
    """
    items, length = training_step(24, kept, resident, 8)
    live = int(live_bytes(items, length).max())
    height, offsets = pack(items, 0, length, live, 0)
    assert height == max(offset + item.size for offset, item in zip(offsets, items))
    assert height <= 1.025 * live
    assert by_rule(items, length) >= 1.07 * live
    assert apart(items, offsets)
    # An arena that is asked for is as large as that at most.
    asked = live + live // 50
    height, offsets = pack(items, 0, length, live, asked)
    assert height <= asked
    assert apart(items, offsets)


def entry(verb, name="", *outputs):
    return DraftInstruction(verb=verb, name=name, layer=0, operator=0, outputs=outputs, seconds=0.0, transfer=0.0)


def test_where_tensors_lie_by_what_makes_them():
    """`kept` is there all the time, `state` leaves in training and comes back; of `nothing` there are no bytes to
    place.
    """
    train = (
        entry("spill", "state"),
        entry("free", "state"),
        entry("read", "w"),
        entry("run", "", "a", None, "nothing"),
        entry("free", "packed:w"),
        entry("fetch", "state"),
        entry("free", "a"),
    )
    evaluate = (entry("run", "", "b"), entry("fetch", "c"), entry("free", "b"))
    sizes = {"kept": 100, "state": DIRECT_BYTES, "packed:w": 70, "a": DIRECT_BYTES, "nothing": 0, "b": 64}
    sizes["c"] = DIRECT_BYTES - 64
    every, height = placed_items(train, evaluate, ("kept", "state"), sizes)
    assert {item.name: (item.spans, item.makers, item.alignment) for item in every} == {
        "kept": ([(0, 6), (7, 9)], [-1], ALIGNMENT),
        "state": ([(0, 1), (5, 6), (7, 9)], [-1, 5], PACKED_ALIGNMENT),
        "packed:w": ([(2, 4)], [2], PACKED_ALIGNMENT),
        "a": ([(3, 6)], [3], ALIGNMENT),
        "b": ([(7, 9)], [7], ALIGNMENT),
        "c": ([(8, 9)], [8], ALIGNMENT),
    }
    assert apart(every, [item.offset for item in every])
    assert all(item.offset % item.alignment == 0 for item in every)
    offsets = {item.name: item.offset for item in every}
    assert offsets["kept"] == 0
    assert height == aligned(max(item.offset + item.size for item in every))
    arena = arena_of(every, height, len(train), len(evaluate))
    assert arena.resident == {name: offsets[name] for name in ("kept", "state")}
    assert arena.train == {(at, name): offsets[name] for at, name in ((2, "packed:w"), (3, "a"), (5, "state"))}
    assert arena.evaluate == {(at, name): offsets[name] for at, name in ((0, "b"), (1, "c"))}
    # What stays lies at the bottom, the widest alignment first, and takes whole units.
    both = {"packed:w": 4096, "a": 70}
    every, height = placed_items((entry("spill", "a"),), (), ("a", "packed:w"), both)
    assert {item.name: item.offset for item in every} == {"packed:w": 0, "a": 4096}
    assert height == 4096 + 128
    # What moves in an evaluation alone lies on pages too.
    every, _ = placed_items((), (entry("fetch", "state"),), (), sizes)
    assert [item.alignment for item in every] == [PACKED_ALIGNMENT]


def test_the_highest_gap():
    taken = [(0, 100), (150, 200), (180, 300), (900, 1000)]
    assert top_gap(taken, 0, 1000, 500, 1) == 400
    assert top_gap(taken, 0, 1000, 600, 1) == 300
    assert top_gap(taken, 0, 1000, 500, 64) == 384
    assert top_gap(taken, 0, 1000, 50, 1) == 850
    assert top_gap(taken, 0, 950, 601, 1) is None
    assert top_gap(taken, 120, 300, 50, 1) is None
    assert top_gap([], 10, 100, 90, 1) == 10


@pytest.mark.parametrize("count", [0, 1, 40])
def test_what_earlier_tensors_take_becomes_less_as_they_end(count):
    """Tensors that are all there at entry 0, some without a gap between them: the bytes that are taken at later
    ones.
    """
    chance, end, placed = random.Random(count), 0, []
    for number in range(count):
        size, end = chance.randint(1, 9), end + chance.choice([0, 0, 3])
        life = TensorLifetime(name=str(number), size=size, alignment=1, spans=[(0, chance.randint(0, 30))], makers=[0])
        placed.append((end, life))
        end += size
    chance.shuffle(placed)
    before = _TakenBefore(placed)
    for entry in (0, 0, *range(3, 33)):
        taken = {byte for at, life in placed if life.spans[0][1] >= entry for byte in range(at, at + life.size)}
        ranges = before.until(entry)
        assert {byte for low, high in ranges for byte in range(low, high)} == taken
        assert all(high < low for (_, high), (low, _) in pairwise(ranges))


def test_a_search_is_the_same_every_time_and_ends_at_its_deadline():
    items = layers(3, 4)
    goal = HEIGHT + HEIGHT // 25
    first, second = (by_groups(layers(3, 4), 0, 4 * LENGTH, goal) for _ in range(2))
    assert first == second is not None
    with pytest.raises(TimeoutError):
        by_groups(items, 0, 4 * LENGTH, goal, Cutoff(-1.0))
    live = int(live_bytes(items, 4 * LENGTH).max())
    with pytest.raises(TimeoutError):
        pack(items, 0, 4 * LENGTH, live, goal, Cutoff(-1.0))


def test_what_is_there_at_one_entry_alone_does_not_overlap_either():
    """Lives that end where others begin, between groups too."""
    for seed in range(3):
        chance = random.Random(seed)
        items = []
        for number in range(200):
            first = number // 2
            last = first + chance.randrange(5)
            size = 64 * chance.randrange(1, 20)
            items.append(
                TensorLifetime(name=f"{number}", size=size, alignment=64, spans=[(first, last)], makers=[first])
            )
        goal = 3 * int(live_bytes(items, 640).max()) // 2
        offsets = by_groups(items, 0, 640, goal)
        assert offsets is not None
        assert apart(items, offsets)


def test_what_a_rule_brings_down_far_enough_is_not_looked_for_elsewhere():
    """The first rule that does, though others come lower."""
    items, length = layers(3, 4), 4 * LENGTH
    order, tight = next(iter(_orders(items)))
    first, _ = _assign(items, order, 0, length, below=ENDLESS, tight=tight)
    height = max(offset + item.size for offset, item in zip(first, items))
    assert by_rule(items, length) < height
    assert pack(items, 0, length, HEIGHT, height) == (height, first)


def test_where_nothing_is_searched_for_the_rules_answer():
    items, length = layers(8, 8), 8 * LENGTH
    height, offsets = pack(items, 0, length, HEIGHT, HEIGHT, options=SearchOptions(packing=False))
    assert height == by_rule(items, length) > HEIGHT
    assert apart(items, offsets)


def test_a_search_by_groups_that_may_not_try_finds_nothing(monkeypatch):
    monkeypatch.setattr(arena_placement, "WORK", (0, 0))
    assert by_groups(layers(3, 8), 0, 8 * LENGTH, HEIGHT + HEIGHT // 25) is None


def test_a_search_by_groups_fails_where_one_layer_holds_more_than_is_allowed():
    count, full = 32, 20
    goal = HEIGHT + HEIGHT // 25
    items = layers(3, count)
    assert by_groups(items, 0, count * LENGTH, goal) is not None
    at = full * LENGTH + LENGTH // 2
    more = TensorLifetime(name="more", size=HEIGHT // 2, alignment=64, spans=[(at, at + 1)], makers=[at])
    assert by_groups([*items, more], 0, count * LENGTH, goal) is None
