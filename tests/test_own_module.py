"""The examples that show the way from Python do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import own_loop, own_module


@pytest.mark.parametrize("kind", ["cnn", "text_classifier"])
def test_the_example_learns_under_its_cap(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, batches = {
        "cnn": (own_module.Cnn(), own_module.images),
        "text_classifier": (own_module.TextClassifier(), own_module.texts),
    }[kind]
    assert own_module.train(f"examples.own_module:{kind}", module, batches, tmp_path) > 0.9
    peak, cap = capsys.readouterr().out.split(": ")[1].split(" MiB")[0].split(" of ")
    assert 100 < int(peak) <= int(cap)


def test_loops_of_one_s_own_learn(tmp_path: Path) -> None:
    taken, loss = own_loop.until_it_no_longer_helps(tmp_path / "cnn")
    assert taken % 40 == 0
    assert 0 < loss < 0.3
    before, after = own_loop.by_the_trainer(tmp_path / "llama", steps=100)
    assert before == pytest.approx(5.545, abs=0.2)  # of 256 words, none is known yet
    assert after < before - 0.3
    lines = [
        json.loads(line)["loss"] for line in (tmp_path / "llama" / "session" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 100
