"""What is measured beside other programs is known to be, and measured again once these are idle; and the cache knows
where the model lies.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from damage import CONFIG
from rich.console import Console

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.report.explain import explain
from tightfit.planner.report.summary import plan_summary, profile_summary
from tightfit.profiles import api
from tightfit.profiles.api import load_profile, profile, save_profile
from tightfit.profiles.measuring import cpu_load
from tightfit.runtime.cli.answers import profile_text

STAT = """cpu  900 0 900 900 900 900 900 900 0 0
cpu0 {0} 10 20 5000 100 1 2 {1} 0 0
cpu1 7 0 0 5000 0 0 0 0 0 0
cpu2 {2} 0 0 0 0 0 0 0 0 0
intr 12345
"""


def told(profile):
    console = Console(file=io.StringIO(), width=300)
    console.print(profile_text(profile))
    return console.file.getvalue()


def test_cores_of_others_are_what_is_not_ours(tmp_path, monkeypatch):
    """Of the two cores that are ours: busy ticks, stolen ones too, less the seconds of this process."""
    monkeypatch.setattr(cpu_load, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    clock, own = iter([10.0, 12.0]), iter([(1.0, 0.5, 0.0, 0.0, 0.0), (1.5, 0.5, 0.25, 0.25, 0.0)])
    monkeypatch.setattr(cpu_load.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "times", lambda: next(own))
    hertz = os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(STAT.format(100, 0, 0))
    others = cpu_load.OtherPrograms()
    (tmp_path / "stat").write_text(STAT.format(100 + 3 * hertz, hertz, 50 * hertz))
    assert others.cores() == pytest.approx((4.0 - 1.0) / 2.0)
    # One of the two cores is free for others while we compute on the other.
    clock, own = iter([12.0] * 3), iter([(1.5, 0.5, 0.25, 0.25, 0.0)] * 3)
    assert [others.taken(threads) for threads in (0, 1, 2)] == pytest.approx([0.0, 0.5, 1.5])


def test_a_little_of_many_cores_does_not_tell():
    assert cpu_load.crowded(0.3, 2)
    assert not cpu_load.crowded(0.2, 2)
    assert not cpu_load.crowded(7.0, 64)


def test_where_the_system_does_not_tell_nobody_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_load, "STAT", tmp_path / "none")
    assert cpu_load.taken_now(2) == 0.0


@pytest.mark.skipif(not cpu_load.STAT.exists(), reason="no /proc/stat")
def test_another_program_is_seen():
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as other:
        try:
            other.stdout.readline()
            assert cpu_load.crowded(cpu_load.taken_now(cpu_load.our_cores()), 1)
        finally:
            other.kill()


class Machine:
    """A clock that goes on while cores are looked at, and other programs that end after so many seconds."""

    def __init__(self, monkeypatch, busy_for):
        self.now, self.said, self.shown = 0.0, [], []
        monkeypatch.setattr(cpu_load, "WAIT_SECONDS", 60.0)
        monkeypatch.setattr(cpu_load, "_now", lambda: self.now)
        monkeypatch.setattr(cpu_load, "taken_now", lambda threads, seconds=0.3: self.look(seconds, busy_for))
        cpu_load.wait_for_cores(2, self.said.append, lambda *progress: self.shown.append(progress))

    def look(self, seconds, busy_for):
        self.now += seconds
        return 1.5 if self.now <= busy_for else 0.1


def test_other_programs_are_waited_for(monkeypatch):
    machine = Machine(monkeypatch, busy_for=20)
    assert [line.split(":")[0] for line in machine.said] == [
        "other programs use 1.5 of the cores",
        "the cores are free after 20 s",
    ]
    assert "at most 60 s (--no-wait goes on at once)" in machine.said[0]
    assert machine.shown[0] == ("waiting for other programs", 0, 60)
    assert machine.shown[-1][1] == 18


def test_the_waiting_has_an_end_and_free_cores_are_not_waited_for(monkeypatch):
    machine = Machine(monkeypatch, busy_for=1000)
    assert machine.now == pytest.approx(60, abs=3)
    assert machine.said[-1].startswith("other programs still use 1.5 of the cores: going on beside them")
    assert Machine(monkeypatch, busy_for=0).said == []


@pytest.mark.slow
def test_a_profile_of_a_busy_moment_is_measured_again_in_an_idle_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    here, there = tmp_path / "here" / "config.json", tmp_path / "there" / "config.json"
    here.parent.mkdir()
    here.write_text(json.dumps(CONFIG))
    told_busy = iter([2.0, 0.0, 3.0])
    measure = functools.cache(lambda: api_measure(*calls[0][0], **calls[0][1]))
    api_measure = api.measure
    calls = []

    def measured(*args, **options):
        """The figures of the first call, which is made in earnest."""
        calls.append((args, options))
        return measure() | {"busy_cores": next(told_busy)}

    monkeypatch.setattr(api, "measure", measured)
    first = profile(str(here), seq=16, threads=1)
    (cached,) = (tmp_path / "cache" / "profiles").iterdir()
    assert (first.device.busy_cores, len(calls)) == (2.0, 1)
    # As long as others are busy it is what there is, wherever the model lies by now.
    shutil.move(here.parent, there.parent)
    monkeypatch.setattr(api, "taken_now", lambda threads: 1.0)
    again = profile(str(there), seq=16, threads=1)
    assert (again.device, again.model.source, len(calls)) == (first.device, str(there), 1)
    assert "other programs took 2.0 cores" in told(again)
    busy_ = ModelPlanner(again).plan(1 << 40)
    # Of the plan too it is the first line.
    assert explain(busy_)[0].startswith("caution: other programs took 2.0 cores")
    assert plan_summary(busy_)["marks"] == profile_summary(again)["marks"] != []
    assert told(again).lstrip().startswith("caution")
    monkeypatch.setattr(api, "taken_now", lambda threads: 0.0)
    calm = profile(str(there), seq=16, threads=1)
    assert (calm.device.busy_cores, len(calls)) == (0.0, 2)
    assert load_profile(cached) == calm
    assert "other programs" not in told(calm)
    assert "caution" not in explain(ModelPlanner(calm).plan(1 << 40))[0]
    # One of an idle moment is returned as it is, and one that came out worse is not kept.
    assert profile(str(there), seq=16, threads=1) == calm
    assert len(calls) == 2
    worse = calm.model_copy(update={"device": calm.device.model_copy(update={"busy_cores": 2.5})})
    save_profile(worse, cached)
    assert profile(str(there), seq=16, threads=1) == worse
    assert len(calls) == 3
    assert load_profile(cached) == worse
