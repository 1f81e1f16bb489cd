"""Arenas searched for: tensors cut from a full rectangle of bytes and time, so that a place without a gap is known to exist."""

from __future__ import annotations

import random
import time

import pytest

from planner.arena import ENDLESS, Item, _assign, _live, _orders, _searched

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
        Item(
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
        one.spans[0][0] <= other.spans[0][1]
        and other.spans[0][0] <= one.spans[0][1]
        and low < high + other.size
        and high < low + one.size
        for at, (one, low) in enumerate(zip(items, offsets))
        for other, high in list(zip(items, offsets))[at + 1 :]
    )


def by_rule(items, length):
    heights = []
    for order, tight in _orders(items):
        offsets, failed = _assign(items, order, 0, ENDLESS, length, tight=tight)
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
        assert set(_live(items, length)[:length].tolist()) == {HEIGHT}
        ruled, goal = by_rule(items, length), HEIGHT + HEIGHT // 25
        found = _searched(items, 0, length, goal, float("inf"))
        if found is None:
            assert ruled > goal  # a rule is never better than the search
            continue
        height, offsets = found
        assert HEIGHT <= height <= goal
        assert apart(items, offsets)
        beaten += ruled > goal
    assert beaten >= 4


def test_the_search_is_the_same_every_time_and_ends_at_its_deadline():
    items = layers(3, 4)
    goal = HEIGHT + HEIGHT // 25
    first, second = (_searched(layers(3, 4), 0, 4 * LENGTH, goal, float("inf")) for _ in range(2))
    assert first == second is not None
    assert _searched(items, 0, 4 * LENGTH, goal, time.monotonic() - 1.0) is None
