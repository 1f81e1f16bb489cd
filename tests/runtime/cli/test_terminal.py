from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys

import pytest
from places import ROOT
from rich.console import Console

from tightfit.runtime.cli import terminal
from tightfit.runtime.cli.terminal import ComparisonDisplay, SolvingDisplay, StagesDisplay, solver_text
from tightfit.runtime.common.interrupts import Interrupts


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100, soft_wrap=True, highlight=False)


@pytest.fixture
def clock(monkeypatch):
    """Every reading is a second after the one before."""
    ticks = itertools.count()
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(ticks)))


def lines(console):
    return console.file.getvalue().splitlines()


def test_stderr_that_nobody_reads_ends_with_the_code_of_a_failed_run():
    code = (
        "from tightfit.runtime.cli import main, terminal\n"
        "main.app = lambda **_: terminal.messages().print('a word')\nmain.main(['compare'])\n"
    )
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-c", code], stderr=write, stdout=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write)
    assert ended.returncode == 4


def test_each_stage_is_named_once_where_there_is_no_terminal(console):
    with StagesDisplay(console) as stages:
        for done in range(3):
            stages("packing", done, 3)
        stages("packing", 3, 3)
        stages("measuring", 0, 1)
    assert lines(console) == ["packing …", "measuring …"]


def test_a_long_stage_is_heard_of_every_ten_seconds(console, clock):
    with StagesDisplay(console) as stages:
        for done in range(40):
            stages("packing", done, 40)
    said = lines(console)
    assert said[0] == "packing …"
    assert 3 <= len(said) <= 5
    assert all(re.fullmatch(r"packing: \d+%", line) for line in said[1:])


def test_solving_tells_incumbent_bound_and_gap(console, clock):
    with SolvingDisplay(console, 30) as solving:
        for _ in range(4):
            solving({"stage": "columns", "incumbent": float("inf"), "bound": 0.0, "gap": float("inf"), "seconds": 1.0})
        for _ in range(8):
            solving({"stage": "rounding", "incumbent": 1.25, "bound": 1.0, "gap": 0.2, "seconds": 2.0})
    said = [line.rsplit(", ", 1)[0] for line in lines(console)]
    assert set(said) == {"solving (rounding), step 1.250 s, bound 1.000 s, gap 20.00%"}


def test_solving_a_step_of_microseconds_tells_them():
    told = {"stage": "rounding", "incumbent": 41e-6, "bound": 40e-6, "gap": 0.025}
    assert solver_text(told) == "(rounding), step 41 µs, bound 40 µs, gap 2.50%"


def test_comparing_tells_which_plan_and_how_far(console, clock):
    interrupts = Interrupts()
    with ComparisonDisplay(console, interrupts) as comparing:
        comparing("planning for phone", 0, 2)
        for _ in range(30):
            comparing.solving({"stage": "columns", "incumbent": 1.25, "bound": 1.0, "gap": 0.2, "seconds": 2.0})
        interrupts.seen = True
        with pytest.raises(KeyboardInterrupt):
            comparing("planning for phone", 1, 2)
        comparing("planning for phone", 2, 2)
    said = lines(console)
    assert said[0] == "planning for phone: 0 of 2"
    assert said[1] == "planning for phone (columns), step 1.250 s, bound 1.000 s, gap 20.00%"
    assert len(said) <= 4
