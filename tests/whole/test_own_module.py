"""The examples that show the way from Python do what they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from examples import own_loop, own_module, trainer

pytestmark = pytest.mark.slow


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
    before, after, logged = trainer.train(tmp_path, steps=100)
    assert before == pytest.approx(5.545, abs=0.2)  # of 256 words, none is known yet
    assert after < before - 0.3
    told = [json.loads(line) for line in (tmp_path / "session" / "metrics.jsonl").read_text().splitlines()]
    assert len(told) == 100
    # The norms that the Trainer logs are those of the plan's gradients, before they were clipped.
    norms = {line["step"]: line["grad_norm"] for line in logged if "grad_norm" in line}
    assert norms == {step: told[step - 1]["grad_norm"] for step in (50, 100)}
    assert all(norm > 0 for norm in norms.values())


def test_the_trainer_logs_no_norm_that_nobody_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(transformers.Trainer, "log", lambda self, logs: logged.append(dict(logs)))
    mine = trainer.PlannedTrainer.__new__(trainer.PlannedTrainer)
    for norm in (None, 0.5):
        mine.session = SimpleNamespace(grad_norm=norm)  # type: ignore[assignment]
        mine.log({"loss": 2.0, "grad_norm": 0.0})
    assert logged == [{"loss": 2.0}, {"loss": 2.0, "grad_norm": 0.5}]
