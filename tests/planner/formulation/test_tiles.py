"""Layers in tiles: one decision for all parts of the batch, and weights that stay between a window's uses or do not."""

from __future__ import annotations

import random
from itertools import product

import pytest
from decisions import figures_of_decisions
from tiny_plans import decoder_profile

from tightfit.planner.formulation.layer_variables import choice_count
from tightfit.planner.problem.build_layers import FREE, SHARED, UNIFORM, held_modes, layered
from tightfit.planner.problem.layer_types import LayerType, WeightMode
from tightfit.planner.schedule.layer_schedule import Decision, expand, measure
from tightfit.profiles.schema import Profile

SEQ = 24
TILES = {"two samples": (8, 48), "a quarter of a sample": (1, 6)}
"""(batch, tokens of a tile)"""


@pytest.fixture(scope="module", params=TILES)
def tiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    batch, tile = TILES[request.param]
    return decoder_profile(tmp_path_factory.mktemp("tiled"), batch=batch, seq=SEQ, tile=tile)


def blocks(profile: Profile) -> list[LayerType]:
    """The types of the layers whose input needs a gradient, one of each program."""
    of_program = {kind.program: kind for kind in layered(profile).types if kind.tiles > 1 and kind.candidates}
    return [kind for kind in of_program.values() if all(w.backward_uses for w in kind.weights.values())]


@pytest.mark.slow
def test_the_layer_model_says_what_the_layers_schedule_does(tiled: Profile) -> None:
    """Where every weight is read in the backward: that of another may end with what is made again, which the model
    leaves open.
    """
    rng = random.Random(0)
    for kind in blocks(tiled):
        assert kind.tiles == 4
        for _, told, counted in figures_of_decisions(rng, kind, 20):
            assert told.pop("instructions") <= counted.pop("instructions") + 1e-6
            # Of a sample's tiles the model looks at the first and last ones, between which keys may be made again.
            assert told["backward_peak"] <= counted["backward_peak"] + 1e-5
            assert told.pop("backward_peak") == pytest.approx(counted.pop("backward_peak"), rel=0.02)
            assert told == pytest.approx(counted, rel=1e-6, abs=1e-5)


@pytest.mark.slow
def test_the_layer_model_never_counts_more(tiled: Profile) -> None:
    rng = random.Random(1)
    for kind in layered(tiled).types:
        for _, told, counted in figures_of_decisions(rng, kind, 8):
            for name, value in told.items():
                assert value <= counted[name] * (1 + 1e-6) + 1e-5, name


def test_as_much_is_decided_as_of_one_tile(tiled: Profile, tmp_path) -> None:
    (kind,) = blocks(tiled)
    whole = [each for each in layered(decoder_profile(tmp_path, batch=2, seq=SEQ)).types if each.candidates]
    assert choice_count(kind) < 1.5 * max(map(choice_count, whole))
    assert sum(kind.counted.values()) == len(kind.candidates)
    for value, like in kind.alike.items():
        if value not in kind.weights:
            assert kind.bytes[value] == kind.bytes[like]


def actions(kind: LayerType, weight: str, mode: WeightMode, window: str) -> list[str]:
    """What a window does with a weight in a mode, where nothing runs again."""
    weights = tuple((name, mode if name == weight else each.modes[0]) for name, each in kind.weights.items())
    decision = Decision(keep=frozenset(kind.candidates), offload=frozenset(), weights=weights, states=frozenset())
    script = getattr(expand(kind, decision), window)
    return [
        verb if name == weight else f"{verb} packed" for verb, name in script if name in {weight, f"packed:{weight}"}
    ]


@pytest.mark.parametrize("window", ["forward", "backward"])
def test_a_weight_is_unpacked_once_or_for_each_tile(tiled: Profile, window: str) -> None:
    kind = next(kind for kind in blocks(tiled))
    weight = next(name for name, each in kind.weights.items() if each.backward_uses == kind.tiles and not each.trained)
    each_use = ["read", "unpack", "free packed", "free"]
    expected = {
        "disk": each_use * kind.tiles,
        "packed": ["read", *["unpack", "free"] * (kind.tiles - 1), "unpack", "free packed", "free"],
        "unpacked": each_use,
    }
    for hold, wanted in expected.items():
        assert actions(kind, weight, WeightMode("disk", "disk", hold), window) == wanted
    assert actions(kind, weight, WeightMode("unpacked", "unpacked", "unpacked"), window) == []


def test_seconds_of_a_mode_are_those_of_its_uses(tiled: Profile) -> None:
    kind = next(kind for kind in blocks(tiled))
    weight = next(name for name, each in kind.weights.items() if each.backward_uses == kind.tiles and not each.trained)
    figures = {}
    for hold in ("disk", "packed", "unpacked"):
        weights = tuple(
            (name, WeightMode("disk", "disk", hold) if name == weight else each.modes[-1])
            for name, each in kind.weights.items()
        )
        keep = frozenset(kind.candidates)
        figures[hold] = measure(kind, Decision(keep=keep, offload=frozenset(), weights=weights, states=frozenset()))
    one = kind.weights[weight]
    assert figures["packed"].reads_forward == pytest.approx(one.read_seconds)
    assert figures["disk"].reads_forward == pytest.approx(kind.tiles * one.read_seconds)
    assert figures["unpacked"].reads_forward == pytest.approx(one.read_seconds)
    again = figures["packed"].forward_seconds - figures["unpacked"].forward_seconds
    assert again == pytest.approx((kind.tiles - 1) * one.unpack_seconds)


@pytest.mark.parametrize("gaps", [FREE, UNIFORM, SHARED])
def test_modes_between_uses_hold_at_least_what_the_gaps_hold(gaps: tuple[WeightMode, ...]) -> None:
    modes, order = held_modes(gaps), ("disk", "packed", "unpacked")
    assert modes[0] == WeightMode("disk", "disk", "disk")
    assert WeightMode("disk", "disk", "unpacked") in modes
    for mode, place in product(modes, order):
        least = max(map(order.index, (mode.backward_gap, mode.step_gap)))
        held = WeightMode(mode.backward_gap, mode.step_gap, place)
        assert (held in modes) == (order.index(place) >= least)
