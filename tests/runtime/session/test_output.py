"""The folder of a run: who may write into it, what of an earlier run counts, and what answers one that is done."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.training import checkpoint
from tightfit.runtime.engine.training.records import RecordFile, RecordWriter
from tightfit.runtime.session.output import finished_report, locked, remove_prepared, staged, to_be_replaced

STEPS = 3


@pytest.mark.parametrize(("error", "free"), [(None, True), (RunError("full"), True), (KeyboardInterrupt(), False)])
def test_a_copy_of_the_lock_holds_it_only_where_the_run_may_go_on(
    tmp_path: Path, error: BaseException | None, free: bool
) -> None:
    """As a DataLoader's workers have it, or the lean process that nobody waits for any more."""
    copy = -1
    try:
        with locked(tmp_path / "out") as lock:
            copy = os.dup(lock)
            if error:
                raise error
    except (RunError, KeyboardInterrupt):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(lock)
    if free:
        with locked(tmp_path / "out"):
            pass
    else:
        with pytest.raises(InputError, match="another run is under way"), locked(tmp_path / "out"):
            pass
    os.close(copy)
    with locked(tmp_path / "out"):
        pass


def test_the_lock_of_a_run_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    """A killed process holds its lock until the kernel has taken it apart, which takes a moment on a busy machine."""
    with ThreadPoolExecutor() as pool:
        with locked(tmp_path / "out"):
            resumed = pool.submit(entered, tmp_path / "out")
            time.sleep(0.3)
            assert not resumed.done()
        assert resumed.result(timeout=5)


def entered(directory: Path) -> int:
    with locked(directory) as lock:
        return lock


def test_what_a_killed_run_had_staged_is_not_this_ones(tmp_path: Path) -> None:
    left = tmp_path / ".data.partial"
    left.mkdir()
    (left / "train.records").touch()
    with pytest.raises(ZeroDivisionError), staged(tmp_path) as staging:  # noqa: PT012
        assert not any(staging.iterdir())
        (staging / "train.records").touch()
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())


def test_half_of_a_checkpoint_goes_and_what_is_empty_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / ".checkpoint-4.partial").mkdir()
    assert to_be_replaced(tmp_path, 5, resume=False, overwrite=False) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert to_be_replaced(tmp_path, 4, resume=True, overwrite=False) == []
    with pytest.raises(InputError, match=r"steps 3: .* has reached step 4; give at least 4, or"):
        to_be_replaced(tmp_path, 3, resume=True, overwrite=False)
    replaced = to_be_replaced(tmp_path, 1, resume=False, overwrite=True)
    assert sorted(path.name for path in replaced) == ["checkpoint-2", "checkpoint-4"]


class Done:
    """A run that has taken all of its steps, and was evaluated."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.train, self.held_out = self.records("train", 1), self.records("evaluate", 2)
        seen = self.fingerprint(self.held_out)
        conditions = {"shape": (2, 3), "data": self.fingerprint(self.train)}
        self.settings: dict[str, Any] = {"conditions": conditions | {"data": "set when it is known"}, "steps": STEPS}
        self.out.mkdir()
        checkpoint.save(str(self.out), STEPS, conditions, lambda _: {"evaluated before": {"data": seen}}, keep=1)
        (self.out / "adapter").mkdir()
        self.report: dict[str, Any] = {
            "loss": [1.0] * STEPS,
            "evaluation": {when: {"loss": 2.0, "data": seen} for when in ("before", "after")},
        }

    def records(self, name: str, token: int) -> Path:
        with RecordWriter(self.folder / name, seq=2, pad_token=0, vocab_size=9, source="") as writer:
            writer.add([token, 1], [1, token], example=0)
        return self.folder / name

    @staticmethod
    def fingerprint(path: Path) -> str:
        with RecordFile.open(path) as file:
            return file.fingerprint

    def told(self, trained: str = "adapter") -> dict[str, Any]:
        """The report, with where the results are now."""
        return self.report | {"adapter": str(self.out / trained), "checkpoint": str(self.out / f"checkpoint-{STEPS}")}

    def answer(self, evaluation: Path | None = None, **settings: Any) -> tuple[dict[str, Any] | None, bool]:
        (self.out / "report.json").write_text(json.dumps(self.report))
        return finished_report(self.out, self.settings | settings, self.train, evaluation, "texts")


def test_what_is_done_answers_and_says_whether_it_was_evaluated_on_these_data(tmp_path: Path) -> None:
    done = Done(tmp_path)
    assert done.answer() == (done.told(), True)
    assert done.answer(done.held_out) == (done.told(), True)
    assert done.answer(done.records("other", 3)) == (done.told(), False)
    del done.report["evaluation"]["after"]
    assert done.answer(done.held_out) == (done.told(), False)


def test_an_older_report_is_no_answer(tmp_path: Path) -> None:
    """That of fewer steps, of a run that was killed after its last checkpoint; or where what was trained has gone."""
    done = Done(tmp_path)
    done.report["loss"].pop()
    assert done.answer() == (None, False)
    done.report["loss"] = [1.0] * (STEPS + 1)
    assert done.answer(steps=STEPS + 1)[0] is None
    done.report["loss"] = [1.0] * STEPS
    (done.out / "adapter").rmdir()
    assert done.answer() == (None, False)
    (done.out / "model").mkdir()
    assert done.answer() == (done.told("model"), True)


@pytest.mark.parametrize(
    "content", ["", '{"loss": [1.0', "[]", "{}", '{"loss": 3}', '{"loss": [1, 1, 1], "evaluation": []}']
)
def test_a_damaged_report_is_none(tmp_path: Path, content: str) -> None:
    done = Done(tmp_path)
    done.answer()
    (done.out / "report.json").write_text(content)
    assert finished_report(done.out, done.settings, done.train, done.held_out, "texts") == (None, False)


def test_another_run_is_no_answer(tmp_path: Path) -> None:
    done = Done(tmp_path)
    done.train = done.records("more", 4)
    with pytest.raises(InputError, match="made with other data than texts"):
        done.answer()


def test_what_somebody_adds_to_a_result_is_in_nobodys_way_on_resume(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).touch()
    (tmp_path / "checkpoint-2").mkdir()
    assert to_be_replaced(tmp_path, 4, resume=True, overwrite=False) == []
    with pytest.raises(InputError, match=r"model holds config\.json, which no run leaves there"):
        to_be_replaced(tmp_path, 4, resume=False, overwrite=True)
    (tmp_path / "model" / "config.json").rename(tmp_path / "model" / ".DS_Store")
    assert tmp_path / "model" in to_be_replaced(tmp_path, 4, resume=False, overwrite=True)


def test_data_that_are_a_link_are_anothers(tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    for folder in (other, out):
        folder.mkdir()
    (other / "train.records").touch()
    (out / "data").symlink_to(other)
    remove_prepared(out)
    assert (other / "train.records").exists()
    (out / "data").unlink()
    (out / "data").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"data is no folder"):
        to_be_replaced(out, 4, resume=False, overwrite=True)


def test_the_results_of_a_finished_run_are_those_it_reported(tmp_path: Path) -> None:
    done = Done(tmp_path)
    (done.out / "model").mkdir()
    done.report["adapter"] = "/where/it/was/model"
    assert done.answer() == (done.told("model"), True)
    (done.out / "model").rmdir()
    assert done.answer() == (done.told(), True)


def refuse(folder: Path, *, writing: str | None = None) -> None:
    with suppress(InputError), locked(folder):
        if writing:
            (folder.parent / writing).write_text("kept")
        raise InputError("refused")


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    """But those that were there before, and those in which something is."""
    refuse(tmp_path / "a" / "b")
    refuse(tmp_path)
    assert list(tmp_path.iterdir()) == []
    refuse(tmp_path / "a" / "b", writing="log")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["log"]
