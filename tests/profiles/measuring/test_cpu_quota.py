"""A CPU quota is found wherever it is set, and a profile made under one says how long a step takes under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from tiny_plans import decoder_profile

from tightfit.profiles.measuring.cpu_quota import MOUNT, QuotaClock, quota_cores, slowdown, useful_threads
from tightfit.profiles.measuring.worker import typical


def tree(root, **files):
    """Write files, with '__' for '/' in their names; returns `root`."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def listed(folder, text):
    path = folder / "self"
    path.write_text(text)
    return path


def test_the_smallest_quota_of_a_group_and_those_around_it_counts(tmp_path):
    mount = tree(
        tmp_path / "two", **{"cgroup.procs": "", "a__cpu.max": "150000 100000\n", "a__b__cpu.max": "max 100000\n"}
    )
    assert quota_cores(mount, listed(tmp_path, "0::/a/b\n")) == 1.5
    (mount / "a" / "b" / "cpu.max").write_text("25000 100000\n")
    assert quota_cores(mount, listed(tmp_path, "0::/a/b\n")) == 0.25
    assert quota_cores(mount, listed(tmp_path, "0::/\n")) is None


def test_the_first_version_of_cgroups(tmp_path):
    mount = tree(
        tmp_path / "one",
        **{
            "cpu,cpuacct__cgroup.procs": "",
            "cpu,cpuacct__g__cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct__g__cpu.cfs_period_us": "100000\n",
        },
    )
    own = listed(tmp_path, "4:memory:/x\n2:cpu,cpuacct:/g\n0::/\n")
    assert quota_cores(mount, own) == 0.5
    (mount / "cpu,cpuacct" / "g" / "cpu.cfs_quota_us").write_text("-1\n")
    assert quota_cores(mount, own) is None


def test_a_machine_without_cgroups_has_no_quota(tmp_path):
    assert quota_cores(tmp_path, tmp_path / "none") is None
    assert quota_cores(tmp_path, listed(tmp_path, "0::/gone\n")) is None


@pytest.mark.parametrize(
    ("quota", "threads", "factor"), [(None, 8, 1.0), (0.25, 1, 4.0), (1.5, 2, 4 / 3), (2.0, 2, 1.0), (64.0, 8, 1.0)]
)
def test_threads_and_what_a_quota_costs_them(quota, threads, factor):
    assert useful_threads(8, quota) == threads
    assert slowdown(threads, quota) == pytest.approx(factor)


def test_the_clock_stands_still_while_the_group_is_held_up(tmp_path):
    mount = tree(
        tmp_path / "two",
        **{"cgroup.procs": "", "a__cpu.max": "50000 100000\n", "a__cpu.stat": "throttled_usec 1000000\n"},
    )
    clock = QuotaClock(2, mount, listed(tmp_path, "0::/a\n"))
    real, begun = time.perf_counter(), clock()
    (mount / "a" / "cpu.stat").write_text("nr_periods 7\nthrottled_usec 4000000\n")
    assert clock() - begun == pytest.approx(time.perf_counter() - real - 3.0 / 2, abs=0.05)


def test_a_call_after_which_the_kernel_counted_late_is_not_counted():
    """One of 4 ms seemed to end before it began: what a mean of all would say is less than nothing."""
    assert typical([4e-3, -9e-2, 4e-3, 4.2e-3, 30e-3]) == pytest.approx((4e-3 + 4e-3 + 4.2e-3) / 3)
    assert typical([-1e-3, -2e-3]) == 0.0


WORK = """
import hashlib, json, statistics, time
from tightfit.profiles.measuring.cpu_quota import QuotaClock, quota_cores, slowdown, useful_threads
data = bytes(2 << 20)
threads = useful_threads(2, quota_cores())
clock, taken, begun = QuotaClock(threads), [], time.perf_counter()
while time.perf_counter() - begun < 4:
    before = clock()
    hashlib.sha256(data)
    taken.append(clock() - before)
mean = (time.perf_counter() - begun) / len(taken)
print(json.dumps({"threads": threads, "quota": quota_cores(), "mean": mean,
                  "predicted": statistics.median(taken) * slowdown(threads, quota_cores())}))
"""
"""measures calls as an operator's are, and how long they take on the whole"""


@pytest.mark.slow
def test_what_is_measured_under_a_quota_is_what_calls_take_under_it(tmp_path):
    group = MOUNT / "cpu" / f"tightfit-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("30000")
    except OSError:
        pytest.skip("no group with a quota can be made here")
    try:
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        words = ["sh", "-c", enter, "sh", sys.executable, "-c", WORK]
        told = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)
    assert (told["threads"], told["quota"]) == (1, 0.3)
    # Without the quota's part of it the prediction would be less than a third of this. The wide range is for other
    # work.
    assert 0.6 < told["mean"] / told["predicted"] < 2.0, told


def test_the_profile_says_what_the_quota_is(tmp_path):
    import io

    from rich.console import Console

    from tightfit.runtime.cli.answers import profile_text

    made = decoder_profile(tmp_path)
    made = made.model_copy(update={"device": made.device.model_copy(update={"quota_cores": 0.25})})
    console = Console(file=io.StringIO(), width=200)
    console.print(profile_text(made))
    assert "under a CPU quota of 0.25 cores" in console.file.getvalue()
