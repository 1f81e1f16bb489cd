"""The examples that show the way from Python do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples import own_loop, own_module, trainer


@pytest.mark.parametrize("kind", ["cnn", "text_classifier"])
def test_the_example_learns_under_its_cap(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, batches = {
        "cnn": (own_module.Cnn(), own_module.images),
        "text_classifier": (own_module.TextClassifier(), own_module.texts),
    }[kind]
    assert own_module.train(f"examples.own_module:{kind}", module, batches, tmp_path) > 0.9
    peak, cap = capsys.readouterr().out.split(": ")[1].split(" MiB")[0].split(" of ")
    assert 40 < int(peak) <= int(cap)


def test_a_loop_of_one_s_own_keeps_its_best(tmp_path: Path) -> None:
    best, steps, loss = own_loop.train(tmp_path / "enough", enough=0.2)
    assert steps % 40 == 0
    assert 0 < loss <= 0.2
    # At a rate of nothing the first pass is the best, and its checkpoint is still there at the end.
    best, steps, loss = own_loop.train(tmp_path / "bad", rate=0.0, patience=3)
    assert (best.name, steps) == ("checkpoint-40", 160)
    module = own_module.Cnn()
    module.load_state_dict(load_file(best / "model.safetensors"))
    with torch.no_grad():
        assert float(sum(module(*batch) for batch in own_module.images(5, 2))) / 5 == pytest.approx(loss, rel=1e-3)


def test_the_trainer_takes_the_steps_of_a_plan(tmp_path: Path) -> None:
    before, after = trainer.train(tmp_path, steps=100)
    assert before == pytest.approx(5.545, abs=0.2)  # of 256 words, none is known yet
    assert after < before - 0.3
    assert len((tmp_path / "session" / "metrics.jsonl").read_text().splitlines()) == 100
