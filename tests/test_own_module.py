"""The example that shows the way from Python does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import own_module


@pytest.mark.parametrize("kind", ["cnn", "text_classifier"])
def test_the_example_learns_under_its_cap(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, batches = {
        "cnn": (own_module.Cnn(), own_module.images),
        "text_classifier": (own_module.TextClassifier(), own_module.texts),
    }[kind]
    assert own_module.train(f"examples.own_module:{kind}", module, batches, tmp_path) > 0.9
    peak, cap = capsys.readouterr().out.split(": ")[1].split(" MiB")[0].split(" of ")
    assert 100 < int(peak) <= int(cap)
