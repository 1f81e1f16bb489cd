"""How many tokens a tile needs for products to keep their speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tightfit.profiles.measuring import bandwidth, tile_rates
from tightfit.profiles.measuring.cpu_load import OtherPrograms
from tightfit.profiles.measuring.tile_rates import fast_tile, smallest_fast, tried_sizes, widest
from tightfit.profiles.steps.decoder_step import tile_sizes
from tightfit.runtime.engine.cpu import products
from tightfit.runtime.engine.weights.layout import Entry


def entries(*shapes: tuple[int, ...]) -> dict[str, Entry]:
    return {
        f"w{number}": Entry(name=f"w{number}", shape=shape, format="float16") for number, shape in enumerate(shapes)
    }


@pytest.mark.parametrize(
    ("batch", "seq", "tried"),
    [
        (1, 32768, [1024, 2048]),
        (1, 4096, [128, 256, 512, 1024, 2048]),
        (16, 64, [64, 128, 256, 512, 1024]),
        (1, 96, [96]),
        (3, 100, [100, 300]),
        (1, 131072, [4096]),
        (1, 4099, [4099]),
    ],
)
def test_sizes_are_apart_and_leave_few_tiles(batch: int, seq: int, tried: list[int]) -> None:
    assert tried_sizes(sorted(tile_sizes(batch, seq)), batch * seq) == tried


def test_the_smallest_that_keeps_its_speed_is_taken() -> None:
    assert smallest_fast({64: 70.0, 128: 94.0, 256: 96.0, 512: 100.0, 1024: 99.0}) == 256
    assert smallest_fast({64: 100.0, 128: 60.0}) == 64


def test_the_matrix_is_the_widest_that_layers_have() -> None:
    assert widest(entries((1000, 8), (16, 8), (16, 8), (32, 8), (32, 8), (8,))) == (32, 8)
    assert widest(entries((1000, 8), (16, 8))) == (1000, 8)


@pytest.mark.slow
def test_products_are_timed_by_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[int, float]] = []

    def smallest(rates: dict[int, float]) -> int:
        seen.append(rates)
        return min(rates)

    monkeypatch.setattr(tile_rates, "smallest_fast", smallest)
    tile = fast_tile(
        [64, 1024],
        entries((512, 256), (512, 256)),
        dtype="float32",
        threads=1,
        memory=None,
        kept=tmp_path / "machine.json",
        anew=False,
        progress=lambda stage, done, total: None,
    )
    assert tile == 64
    # A machine multiplies that by 64 tokens in a millisecond, and by 1,024 in more than one.
    (rates,) = seen
    assert all(1e3 < rate < 1e9 for rate in rates.values())
    assert 1024 / rates[1024] > 64 / rates[64]


def test_what_was_measured_on_a_quiet_machine_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "reference_seconds", lambda: 1.0)
    monkeypatch.setattr(OtherPrograms, "taken", lambda self, threads: 0.0)
    request: dict[str, Any] = {
        "shape": [64, 32],
        "sizes": [64, 128],
        "dtype": "float32",
        "threads": 1,
        "kept": str(tmp_path / "machine.json"),
        "anew": False,
    }
    made: list[Any] = []
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *terms, out: (made.append(out), multiply(*terms, out=out)))
    seconds = tile_rates.measure(request, lambda stage, done, total: None)
    assert made
    made.clear()
    assert tile_rates.measure(request, lambda stage, done, total: None) == seconds
    assert not made
    tile_rates.measure(request | {"anew": True}, lambda stage, done, total: None)
    assert made
