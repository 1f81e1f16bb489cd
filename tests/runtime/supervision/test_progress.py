"""What is shown of a run, without a library."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re

import pytest

from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.units import MIB
from tightfit.runtime.supervision import progress
from tightfit.runtime.supervision.progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch):
    """Every reading is a second after the one before."""
    ticks = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))


def test_training_lines_hold_what_a_person_wants_to_know(clock):
    file = io.StringIO()
    with TrainingProgress(steps=3, tokens_per_step=1024, budget=350 * MIB, other_bytes=8 * MIB, file=file) as training:
        training.stage("evaluating before", 0, 25)
        training(1, 0.7, 2.0, 300 * MIB, 301 * MIB, 40)
        training(3, 0.51234, 2.0, 330 * MIB, 331 * MIB, 40)
    assert file.getvalue().splitlines() == [
        "evaluating before …",
        "step 3/3: loss 0.5123, 20 tokens/s (rows 96% padding), 0:00 left, memory 338.0 MiB, peak 339.0 MiB of 350.0 MiB",
    ]


def test_a_long_evaluation_is_heard_of_every_ten_seconds(clock):
    file = io.StringIO()
    with TrainingProgress(steps=3, tokens_per_step=1024, budget=MIB, file=file) as training:
        for done in range(40):
            training.stage("evaluating before", done, 40)
    said = file.getvalue().splitlines()
    assert said[0] == "evaluating before …"
    assert 3 <= len(said) <= 5
    assert all(re.fullmatch(r"evaluating before: \d+ of 40", line) for line in said[1:])
    assert not training.stepped


def test_a_module_has_seconds_instead_of_tokens():
    file = io.StringIO()
    with TrainingProgress(steps=120, tokens_per_step=None, budget=350 * MIB, file=file) as training:
        training(120, 0.5, 1.5, MIB, MIB)
    assert file.getvalue().startswith("step 120/120: loss 0.5000, 1.500 s per step, 0:00 left")
    assert training.stepped


def test_an_epoch_is_told_where_it_is_known(clock):
    file = io.StringIO()
    with TrainingProgress(steps=30, tokens_per_step=None, budget=MIB, epoch_steps=10.0, file=file) as training:
        training(30, 0.5, 1.5, 1, 1)
        between = {"step": 20, "eval_loss": 1.25, "best": True, "over": False}
        training.evaluated(between)
        training.evaluated(between | {"eval_accuracy": 0.5, "best": False, "over": True})
    assert file.getvalue().splitlines()[0].startswith("step 30/30 (epoch 3.00): loss 0.5000, ")
    assert file.getvalue().splitlines()[1:] == [
        "evaluated after step 20: loss 1.2500, the best so far",
        "evaluated after step 20: loss 1.2500, accuracy 0.500; the run ends, since none was better for as long as it was to wait",
    ]


def test_time_left_counts_the_steps_to_come():
    file = io.StringIO()
    with TrainingProgress(steps=121, tokens_per_step=100, budget=MIB, file=file) as training:
        training._last_line -= 100
        training(1, 1.0, 1.0, 1, 1)
    assert ", 2:00 left," in file.getvalue()


def test_a_terminal_gets_one_line_that_is_wiped_in_the_end():
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as file:
        with TrainingProgress(steps=2, tokens_per_step=64, budget=350 * MIB, file=file) as training:
            training.stage("evaluating before", 1, 2)
            training(1, 0.7, 1.0, 300 * MIB, 301 * MIB, 16)
            training(2, 0.6, 1.0, 349 * MIB, 349 * MIB, 16)
            training._show("x" * 500)
        file.write("\0")
    written = b""
    while not written.endswith(b"\0"):  # a terminal hands over what was written in parts
        written += os.read(parent, 1 << 16)
    os.close(parent)
    shown = written[:-1].decode()
    assert "\n" not in shown
    assert "evaluating before ━━━━━┄┄┄┄┄ 1/2" in shown
    assert "━━━━━┄┄┄┄┄ 1/2 loss 0.7000, 16 tokens/s, 0:01 left, 301.0 of 350.0 MiB" in shown
    assert "\x1b[31m" in shown  # nearly full: in red
    assert "x" * 500 not in shown  # cut to the width
    assert shown.endswith(progress.ERASE_LINE)


def test_a_terminal_shows_the_epoch_where_it_is_wide_enough(monkeypatch):
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as file:
        with TrainingProgress(steps=2, tokens_per_step=64, budget=350 * MIB, epoch_steps=2.0, file=file) as training:
            for columns in (120, 80):
                monkeypatch.setattr(progress.TrainingProgress, "_columns", columns)
                training(1, 0.7, 1.0, 300 * MIB, 301 * MIB, 16)
            training.evaluated({"step": 1, "eval_loss": 1.25, "best": False, "over": False})
        file.write("\0")
    written = b""
    while not written.endswith(b"\0"):
        written += os.read(parent, 1 << 16)
    os.close(parent)
    shown = written.decode()
    assert "━━━━━┄┄┄┄┄ 1/2 epoch 0.50 loss 0.7000, 16 tokens/s, 0:01 left, 301.0 of 350.0 MiB" in shown
    assert "━━━━━┄┄┄┄┄ 1/2 loss 0.7000, 16 tokens/s, 0:01 left, 301.0 of 350.0 MiB" in shown
    assert f"{progress.ERASE_LINE}evaluated after step 1: loss 1.2500\r\n" in shown


def test_a_pipe_that_nobody_reads_ends_the_run_with_words():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file, TrainingProgress(steps=2, tokens_per_step=64, budget=1, file=file) as training:
        with pytest.raises(RunError, match="what read stderr has ended"):
            training(2, 0.7, 1.0, 1, 1)
        training(2, 0.7, 1.0, 1, 1)  # further words go nowhere
