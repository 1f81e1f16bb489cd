"""What TensorBoard and Weights & Biases are told of a run; with stand-ins for as much of them as is called, and
themselves where they are installed.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.session import trackers
from tightfit.runtime.session.trackers import track

LINES = [
    {"step": 0, "epoch": 0.0, "time": 10.0, "eval_loss": 3.0, "eval_seconds": 0.5},
    {"step": 1, "loss": 2.5, "lr": 0.1, "epoch": 0.5, "time": 11.0, "seconds": 1.0},
    {"step": 2, "loss": 2.0, "lr": 0.1, "epoch": 1.0, "time": 12.0, "seconds": 1.0},
    {"step": 2, "epoch": 1.0, "time": 12.5, "eval_loss": 2.5, "eval_seconds": 0.5, "eval_accuracy": 0.5, "best": True},
]


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


class Writer:
    """TensorBoard's `EventFileWriter`."""

    made: list[Writer] = []

    def __init__(self, folder: str, filename_suffix: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        Path(folder, f"events.out.tfevents.{len(self.made)}.host{filename_suffix}").touch()
        self.events: list[Any] = []
        self.flushed = self.closed = False
        self.made.append(self)

    def add_event(self, event: Any) -> None:
        self.events.append(event)

    def flush(self) -> None:
        self.flushed = True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    def summary(value: list[Any]) -> dict[str, float]:
        return {one.tag: one.simple_value for one in value}

    summary.Value = SimpleNamespace  # type: ignore[attr-defined]
    for name in (
        "tensorboard",
        "tensorboard.compat",
        "tensorboard.compat.proto",
        "tensorboard.summary",
        "tensorboard.summary.writer",
    ):
        module(monkeypatch, name)
    module(monkeypatch, "tensorboard.compat.proto.event_pb2", Event=SimpleNamespace)
    module(monkeypatch, "tensorboard.compat.proto.summary_pb2", Summary=summary)
    module(monkeypatch, "tensorboard.summary.writer.event_file_writer", EventFileWriter=Writer)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_tensorboard_gets_every_figure_with_its_step_and_time(out: Path, tensorboard: list[Writer]) -> None:
    for _ in range(2):  # once more takes the place of the first
        assert track(out, "tensorboard", follow=False) == {"steps": 2, "evaluations": 2}
    assert len(list((out / "tensorboard").iterdir())) == 1
    writer = tensorboard[-1]
    assert writer.flushed
    assert writer.closed
    assert [(event.step, event.wall_time, event.summary) for event in writer.events] == [
        (0, 10.0, {"eval/epoch": 0.0, "eval/loss": 3.0, "eval/seconds": 0.5}),
        (1, 11.0, {"train/loss": 2.5, "train/lr": 0.1, "train/epoch": 0.5, "train/seconds": 1.0}),
        (2, 12.0, {"train/loss": 2.0, "train/lr": 0.1, "train/epoch": 1.0, "train/seconds": 1.0}),
        (2, 12.5, {"eval/epoch": 1.0, "eval/loss": 2.5, "eval/seconds": 0.5, "eval/accuracy": 0.5, "eval/best": True}),
    ]


def test_wandb_gets_the_same_run_however_often(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[Any] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(
            log=lambda figures, step: logged.append(
                (step, figures["train/loss" if "train/loss" in figures else "eval/loss"])
            ),
            finish=lambda: logged.append("finished"),
        )

    module(monkeypatch, "wandb", init=init, Error=OSError)
    for _ in range(2):
        assert track(out, "wandb", follow=False) == {"steps": 2, "evaluations": 2}
    assert logged[:5] == [(0, 3.0), (1, 2.5), (2, 2.0), (2, 2.5), "finished"]
    assert begun[0] == begun[1]
    assert begun[0] | {"id": ""} == {"id": "", "name": out.name, "dir": str(out), "resume": "allow"}
    another = [LINES[0] | {"eval_seconds": 0.25}, *LINES[1:]]  # a run with the same losses
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in another))
    track(out, "wandb", follow=False)
    assert begun[2]["id"] != begun[0]["id"]

    def refused(**options: Any) -> Any:
        raise OSError("no API key")

    module(monkeypatch, "wandb", init=refused, Error=OSError)
    with pytest.raises(RunError, match=r"^W&B takes no run: no API key; `wandb login`, or set WANDB_MODE=offline$"):
        track(out, "wandb", follow=False)


def test_a_run_is_followed_to_its_end_and_through_a_resume(
    out: Path, tensorboard: list[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run writes its file anew and takes a step again, which is told once."""
    directory = os.open(out, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    looks: list[list[int]] = []

    def slept(seconds: float) -> None:
        looks.append([event.step for event in tensorboard[0].events])
        if len(looks) == 1:
            (out / "new").write_text(
                "".join(json.dumps(line) + "\n" for line in [*LINES[:2], LINES[2] | {"seconds": 9}])
            )
            (out / "new").replace(out / "metrics.jsonl")
        elif len(looks) == 2:
            with (out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(LINES[3]) + "\n" + json.dumps(LINES[2] | {"step": 3}) + "\n")
            os.close(directory)

    monkeypatch.setattr(time, "sleep", slept)
    said: list[int] = []
    assert track(out, "tensorboard", follow=True, tell=said.append) == {"steps": 3, "evaluations": 2}
    assert looks == [[0, 1, 2, 2]] * 2
    assert [event.step for event in tensorboard[0].events] == [0, 1, 2, 2, 3]
    assert said == [2, 2, 3]


def test_ctrl_c_ends_it_in_order(out: Path, tensorboard: list[Writer], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    monkeypatch.setattr(trackers, "is_locked", lambda _: True)
    assert track(out, "tensorboard", follow=True) == {"steps": 2, "evaluations": 2}
    assert tensorboard[0].closed


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_there_is_an_extra(out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"^{name}.* is not installed: pip install 'tightfit\[{name}\]'$"):
        track(out, name, follow=False)


def test_where_no_run_is_nothing_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"holds no steps of a run; name the output folder of `tightfit run`"):
            track(folder, "tensorboard", follow=True)
    with pytest.raises(InputError, match="tracker 'mlflow' is not known; choose one of tensorboard, wandb"):
        track(tmp_path, "mlflow", follow=False)


def test_tensorboard_itself_reads_every_figure(out: Path) -> None:
    """Where the extra `tensorboard` is installed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # once more takes the place of the first
        assert track(out, "tensorboard", follow=False) == {"steps": 2, "evaluations": 2}
    found = EventAccumulator(str(out / "tensorboard")).Reload()
    read = {
        (name, event.step, event.wall_time): event.value
        for name in found.Tags()["scalars"]
        for event in found.Scalars(name)
    }
    told = {
        (
            f"{'eval' if 'eval_loss' in line else 'train'}/{name.removeprefix('eval_')}",
            line["step"],
            line["time"],
        ): figure
        for line in LINES
        for name, figure in line.items()
        if name not in ("step", "time")
    }
    told = {place: float(figure) for place, figure in told.items()}
    assert read == pytest.approx(told)


def offline_records(path: Path) -> Iterator[bytes]:
    """The records of what W&B writes offline: LevelDB's log format behind 7 bytes, in blocks of 32 KiB."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_itself_takes_every_figure_offline(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra `wandb` is installed."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        assert track(out, "wandb", follow=False) == {"steps": 2, "evaluations": 2}
    finally:
        wandb.teardown()
    (written,) = out.glob("wandb/offline-run-*/run-*.wandb")
    read: dict[int, dict[str, Any]] = {}
    for data in offline_records(written):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if values:
            read.setdefault(values["_step"], {}).update(values)
    assert {step: values.get("train/loss") for step, values in read.items()} == {0: None, 1: 2.5, 2: 2.0}
    assert {step: values.get("eval/loss") for step, values in read.items()} == {0: 3.0, 1: None, 2: 2.5}
    assert read[2]["eval/accuracy"] == 0.5
