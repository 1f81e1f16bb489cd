"""What a machine can spare: made-up /proc and cgroup files, figures by hand."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.supervision.spare_memory import free_memory, spare_memory

MIB = 1 << 20
UNLIMITED = 9223372036854771712
"""what version 1 of cgroups says where there is no limit"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write the files of a made-up machine: available KiB, lines of /proc/self/cgroup, files of the cgroups."""
    monkeypatch.setattr(resource, "getrlimit", lambda number: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def make(available, cgroup="", **files):
        proc, mount = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
        (proc / "self/cgroup").write_text(cgroup)
        for name, content in files.items():
            path = mount / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(content))
        return spare_memory(proc, mount)

    return make


def test_an_eighth_of_what_is_available_stays_free(machine):
    budget, why = machine(8000 * 1024)
    assert budget == 7000 * MIB
    assert why == "8000.0 MiB are available on this machine, less 1000.0 MiB that stay free"


def test_at_least_128_mib_stay_free_and_whole_mib_are_spared(machine):
    assert machine(500 * 1024 + 1)[0] == 372 * MIB


def test_of_a_limit_of_its_own_an_eighth_stays_free(machine):
    """No other programs come and go there: 128 MiB of a container with 300 would be too many."""
    files = {"memory.max": 300 * MIB, "memory.current": 60 * MIB, "memory.stat": "inactive_file 0\n"}
    assert machine(8000 * 1024, "0::/\n", **files)[0] == 210 * MIB


def test_what_this_process_holds_and_gives_back_is_free(machine, tmp_path):
    files = {"memory.max": 300 * MIB, "memory.current": 60 * MIB, "memory.stat": "inactive_file 0\n"}
    machine(8000 * 1024, "0::/\n", **files)
    assert spare_memory(tmp_path / "proc", tmp_path / "cgroup", given_back=40 * MIB)[0] == 245 * MIB


def test_nothing_is_left(machine):
    with pytest.raises(InputError) as caught:
        machine(128 * 1024)
    assert str(caught.value) == (
        "memory='auto': 128.0 MiB are available on this machine, and 128.0 MiB of that stay free; end other programs, or"
        " name a size"
    )


def test_a_kernel_that_does_not_say(tmp_path):
    with pytest.raises(InputError, match="the kernel does not say what is available"):
        spare_memory(tmp_path, tmp_path)


@pytest.mark.parametrize("own", ["/work/job", "/"])
def test_the_tightest_cgroup_counts_whichever_level_it_is_on(machine, tmp_path, own):
    """2000 of 3000 MiB are used, 400 of them by files that the kernel would drop: 1400 are left, of which an eighth
    stays.
    """
    where = own.lstrip("/")
    files = {
        f"{where}/memory.max": "max",
        f"{where}/memory.current": 1,
        "memory.max": 3000 * MIB,
        "memory.high": 4000 * MIB,
        "memory.current": 2000 * MIB,
        "memory.stat": f"anon 5\nactive_file {700 * MIB}\ninactive_file {400 * MIB}\n",
    }
    budget, why = machine(8000 * 1024, f"0::{own}\n", **files)
    assert budget == 1225 * MIB
    left = re.escape(f"1400.0 MiB are left of the 3000.0 MiB of the cgroup {tmp_path / 'cgroup'}, less 175.0 MiB")
    assert re.match(left, why)


def test_a_limit_that_slows_down_counts_as_one_that_kills(machine):
    files = {"a/memory.max": 4000 * MIB, "a/memory.high": 2000 * MIB, "a/memory.current": 400 * MIB}
    assert machine(8000 * 1024, "0::/a\n", **files)[0] == 1400 * MIB


def test_version_1_of_cgroups(machine):
    files = {
        "memory/docker/x/memory.limit_in_bytes": 2000 * MIB,
        "memory/docker/x/memory.usage_in_bytes": 600 * MIB,
        "memory/docker/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {200 * MIB}\n",
        "memory/memory.limit_in_bytes": UNLIMITED,
        "memory/memory.usage_in_bytes": 9000 * MIB,
    }
    assert machine(8000 * 1024, "5:cpu:/\n4:memory:/docker/x\n0::/\n", **files)[0] == 1400 * MIB


def test_a_cgroup_with_more_than_the_machine_changes_nothing(machine):
    files = {"a/memory.max": 9000 * MIB, "a/memory.current": 0}
    assert machine(8000 * 1024, "0::/a\n", **files)[0] == 7000 * MIB


def test_limits_of_the_shell(machine, monkeypatch):
    limits = {resource.RLIMIT_AS: 6000 * MIB, resource.RLIMIT_DATA: 4000 * MIB}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (limits[number], limits[number]))
    budget, why = machine(8000 * 1024)
    assert budget == 3500 * MIB
    assert why.startswith("4000.0 MiB are the data segment that a process may have (ulimit -d), less 500.0 MiB")


def test_this_machine_can_spare_less_than_it_has():
    with Path("/proc/meminfo").open() as file:
        total = int(next(line for line in file if line.startswith("MemTotal:")).split()[1]) << 10
    budget, _ = spare_memory()
    assert 0 < budget < total


@pytest.mark.parametrize("mapped", [100, 500])
def test_page_cache_that_nobody_has_mapped_is_taken_back_too(machine, tmp_path, mapped):
    """Of what was used lately only that which is mapped stays; what was not used lately counts in any case."""
    stat = f"active_file {300 * MIB}\ninactive_file {100 * MIB}\nfile_mapped {mapped * MIB}\n"
    files = {"memory.max": 800 * MIB, "memory.current": 700 * MIB, "memory.stat": stat}
    machine(8000 * 1024, "0::/\n", **files)
    free = [free_memory(tmp_path / "proc", tmp_path / "cgroup", unmapped=unmapped)[0] for unmapped in (False, True)]
    assert free == [200 * MIB, (400 if mapped == 100 else 200) * MIB]
