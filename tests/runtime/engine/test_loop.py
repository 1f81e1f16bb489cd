"""The loop of a run between its steps: when it stops, and how its result is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.fleet.role import FleetRole
from tightfit.runtime.engine.training.loop import MetricsFile, _Run, _save_trained, _Stopped
from tightfit.runtime.engine.weights import safetensors_file
from tightfit.runtime.engine.weights.safetensors_file import TensorItem


def running(*, stopping: bool, every: int, steps: int | None) -> tuple[Any, list[int]]:
    """A run without a training, and the steps after which it saved."""
    one: Any = object.__new__(_Run)
    saved: list[int] = []
    one.header = {"checkpoint_every": every, "steps": steps}
    one.role = FleetRole()
    one.metrics = one.send = one.evaluations = None
    one.watched, one.peaks, one.done = {}, {}, 0
    one._step = lambda *_: {"loss": 1.0}
    one._tell = lambda *_: None
    one.stopping = lambda: stopping
    one._save = lambda: saved.append(one.done)
    return one, saved


def test_a_run_stops_between_steps_and_not_after_its_last() -> None:
    """A signal in the last step does not make of a run that is done one that was interrupted."""
    one, saved = running(stopping=True, every=0, steps=3)
    one.done = 1
    with pytest.raises(_Stopped):
        one.take(2)
    assert (one.done, saved) == (2, [])
    one.take(3)
    assert (one.done, saved) == (3, [3])


@pytest.mark.parametrize(
    ("every", "steps", "kept"), [(2, 5, [2, 4, 5]), (0, 5, [5]), (3, 6, [3, 6]), (2, None, [2, 4])]
)
def test_checkpoints_are_made_in_time_and_after_the_last_step(every: int, steps: int | None, kept: list[int]) -> None:
    one, saved = running(stopping=False, every=every, steps=steps)
    for step in range(1, (steps or 5) + 1):
        one.take(step)
    assert saved == kept


def step(training: Any, folder: Path, send: Any) -> None:
    """Take step 7 of a run with this training, and tell its figures."""
    one: Any = object.__new__(_Run)
    one.header = {"traced_steps": []}
    one.training, one.send, one.peaks, one.begun, one.trace = training, send, {}, 0, None
    one.metrics = MetricsFile(str(folder / "m"), 0)
    one._tell(7, one._step(7, None))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_is_told_first(tmp_path: Path, loss: float) -> None:
    training: Any = SimpleNamespace(
        step=lambda number: loss,
        figures={},
        executor=SimpleNamespace(seconds={}, routing=None),
        meter=SimpleNamespace(check_peak=lambda: 1),
        rate=0.5,
        rate_of=lambda _: 0.5,
    )
    told: list[str] = []
    with pytest.raises(InputError, match=r"^the loss of step 7 is not a number; lower the learning rate \(lr 0\.5\)"):
        step(training, tmp_path, lambda event, **_: told.append(event))
    assert told == ["step"]
    assert (tmp_path / "m").read_text().startswith('{"step": 7, ')


def test_a_step_is_told_with_its_tokens_where_they_are_known(tmp_path: Path) -> None:
    def told_of(**figures: float) -> dict[str, Any]:
        training: Any = SimpleNamespace(
            step=lambda number: 1.5,
            figures=figures,
            executor=SimpleNamespace(seconds={}, routing=None),
            meter=SimpleNamespace(check_peak=lambda: 1),
            rate_of=lambda _: 0.5,
        )
        told: list[dict[str, Any]] = []
        step(training, tmp_path, lambda _, **figures: told.append(figures))
        (line,) = map(json.loads, (tmp_path / "m").read_text().splitlines())
        assert line == {name: value for name, value in told[0].items() if name != "spent"}
        return told[0]

    assert told_of(tokens=78, samples=3).items() >= {"tokens": 78, "samples": 3}.items()
    assert "tokens" not in told_of()


def written(events: list[str], *, full: bool = False) -> Any:
    def save(path: str, *, whole: bool) -> None:
        if full:
            Path(path, "half").touch()
            raise OSError(28, "No space left on device")
        item = TensorItem(name="a", dtype="float32", shape=[1], chunks=lambda: [bytes(4)])
        safetensors_file.write(f"{path}/x.safetensors", lambda: [item], {})

    return SimpleNamespace(channel=SimpleNamespace(drain=lambda: events.append("drained")), save_trained=save)


def test_a_result_is_whole_and_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the transfers that are under way; nothing of an earlier result, or of one that was killed, gets in."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(old: str, new: str) -> None:
        events.append(f"{Path(new).name} named")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    for folder in ("adapter", "adapter.partial"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "old").touch()
    assert _save_trained(written(events), str(tmp_path / "adapter")) == str(tmp_path / "adapter")
    assert events == ["drained", "x.safetensors", "adapter.partial", "adapter named"]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["adapter", "adapter/x.safetensors"]


def test_a_result_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    with pytest.raises(RunError, match="adapter failed: No space left on device; the last checkpoint holds the same"):
        _save_trained(written([], full=True), str(tmp_path / "adapter"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "old").exists()
