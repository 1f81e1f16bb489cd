"""Matrices in slices and experts of a mixture: weights of their own, of which those of one matrix have one decision in
a layer.
"""

from __future__ import annotations

import random

import pytest
from decisions import bounds_of_schedules, figures_of_decisions
from reference import MIXTURE
from synthetic import device
from tiny_plans import CONFIG, decoder_profile

from tightfit.planner.formulation.layer_variables import choice_count
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.layer_types import LayerType
from tightfit.profiles.schema import Profile

BATCH, SEQ = 2, 24
CUT = {"slices": (CONFIG, 32, None), "experts in tiles": (MIXTURE, 48, 12)}
"""(config, rows of a matrix at a time, tokens of a tile)"""


@pytest.fixture(scope="module", params=CUT)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    config, rows, tile = CUT[request.param]
    folder = tmp_path_factory.mktemp("cut")
    return decoder_profile(folder, config=config, batch=BATCH, seq=SEQ, matrix_rows=rows, tile=tile)


def blocks(profile: Profile) -> list[LayerType]:
    """The types of layers that have slices with one decision."""
    return [kind for kind in layered(profile).types if any("[" in name for name in kind.alike if name in kind.weights)]


@pytest.mark.slow
def test_slices_of_one_matrix_have_one_decision(cut: Profile) -> None:
    for kind in blocks(cut):
        slices = {name for name, weight in kind.weights.items() if not weight.trained}
        tied = {name: like for name, like in kind.alike.items() if name in slices}
        assert len(tied) >= 6
        for name, like in tied.items():
            assert name.partition("[")[0] == like.partition("[")[0]
            assert kind.weights[name].bytes == kind.weights[like].bytes
            assert kind.weights[name].modes == kind.weights[like].modes
        free = sum(len(kind.weights[name].modes) for name in slices)
        assert (
            choice_count(kind)
            <= free - sum(len(kind.weights[name].modes) for name in tied) + 2 * len(kind.candidates) + 20
        )


@pytest.mark.slow
def test_slices_of_the_head_are_decided_on_one_by_one(tmp_path) -> None:
    made = decoder_profile(
        tmp_path, config=CONFIG | {"vocab_size": 1 << 16, "tie_word_embeddings": False}, batch=1, seq=16
    )
    head = layered(made).types[-1]
    assert len(head.weights) > 1
    assert not head.alike


@pytest.mark.slow
def test_the_layer_model_says_what_the_layers_schedule_does(cut: Profile) -> None:
    rng = random.Random(0)
    for kind in blocks(cut):
        for _, told, counted in figures_of_decisions(rng, kind, 12):
            for name, value in told.items():
                assert value <= counted[name] * (1 + 1e-6) + 1e-5, name
            if kind.tiles == 1:
                told.pop("instructions"), counted.pop("instructions")
                told.pop("backward_peak"), counted.pop("backward_peak")
                assert told == pytest.approx(counted, rel=1e-6, abs=1e-5)


@pytest.mark.slow
def test_no_schedule_is_faster_than_its_bounds(cut: Profile) -> None:
    assert bounds_of_schedules(random.Random(2), cut.model_copy(update={"device": device(per_instruction=20)}), 3)
