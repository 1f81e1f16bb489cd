"""Runs whose layers take a part of the batch at a time: within their cap, the same bits at every budget, and the
losses of all tokens at once.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from three_plans import losses_of_equal_runs, three_plans
from tiny_plans import CONFIG

from tightfit.planner.plan import plan
from tightfit.planner.schema import tile_tokens
from tightfit.profiles.api import profile
from tightfit.profiles.measuring import tile_rates
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.records import RecordWriter
from tightfit.runtime.session.launch import run

BATCH, SEQ, STEPS = 4, 64, 6
TILES = {"two rows": 128, "half a row": 32}
TRAINING: dict[str, Any] = {"steps": STEPS, "lr": 1e-2, "seed": 7, "cgroup": False, "packing": True}


def profiled(folder: Path, tile: int | None) -> Profile:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | {"max_position_embeddings": 4096}))
    return profile(str(path), batch=BATCH, seq=SEQ, lora_rank=4, tile=tile)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepared samples of 2 to 50 tokens, of which several share a row."""
    generator, path = random.Random(0), tmp_path_factory.mktemp("tiles") / "samples.records"
    with RecordWriter(path, seq=SEQ, pad_token=0, vocab_size=CONFIG["vocab_size"], source="test") as writer:
        for example in range(120):
            tokens = [generator.randrange(1, CONFIG["vocab_size"]) for _ in range(generator.randint(3, 51))]
            writer.add(tokens[:-1], tokens[1:], example=example)
    return str(path)


@pytest.fixture(scope="module", params=TILES)
def tiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profiled(tmp_path_factory.mktemp("tiled"), TILES[request.param])


@pytest.mark.slow_but_for("half a row")
def test_every_plan_gives_the_same_bits_within_its_cap(tiled: Profile, data: str, tmp_path: Path) -> None:
    losses = losses_of_equal_runs(three_plans(tiled), data, tmp_path, TRAINING)
    whole = run(plan(profiled(tmp_path, None), 1 << 30), data, out=tmp_path / "whole", **TRAINING)
    assert losses == pytest.approx(whole["loss"], rel=2e-3)


@pytest.mark.slow
def test_a_measured_tile_is_that_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiled twice it is the same profile, that of the size that was found to be fast; the command says which."""
    monkeypatch.setattr(tile_rates, "smallest_fast", lambda rates: sorted(rates)[1])
    measured = profiled(tmp_path, 0)
    assert tile_tokens(measured) == 128
    assert profiled(tmp_path, 128).fingerprint == measured.fingerprint
    assert profiled(tmp_path, 0).fingerprint == measured.fingerprint


def test_where_a_tile_cannot_be_measured_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="give the tokens of a tile"):
        profile(str(tmp_path / "config.json"), batch=BATCH, seq=SEQ, tile=0, device="zen5-2core")
    with pytest.raises(InputError, match="the two answers of a pair"):
        profile(str(tmp_path / "config.json"), batch=BATCH, seq=SEQ, tile=0, loss="dpo")
    with pytest.raises(InputError, match="tile 0: measuring products takes"):
        profile(str(tmp_path / "config.json"), batch=BATCH, seq=SEQ, tile=0, memory=64 << 20)
