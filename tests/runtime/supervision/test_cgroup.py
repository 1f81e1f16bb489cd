import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tightfit.runtime.supervision.cgroup import MemoryCgroup

MIB = 1 << 20
PYTHON = [sys.executable, "-S", "-c"]


@pytest.fixture
def group():
    made = MemoryCgroup.create(64 * MIB)
    if made is None:
        pytest.skip("this machine lets us make no memory cgroup")
    yield made
    made.remove()
    assert not made.path.exists()


def test_a_process_within_the_limit_ends_well_and_is_counted(group):
    done = subprocess.run(
        group.enter([*PYTHON, "x = bytearray(20 << 20); print(len(x))"]), capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout == b"%d\n" % (20 * MIB)
    assert 20 * MIB < group.peak_bytes() < 64 * MIB
    assert group.oom_kills() == 0


def test_the_kernel_ends_a_process_beyond_the_limit(group):
    done = subprocess.run(group.enter([*PYTHON, "x = bytearray(72 << 20)"]), capture_output=True, check=False)
    assert done.returncode == -9
    assert group.oom_kills() >= 1


def test_arguments_reach_the_command_untouched(group):
    done = subprocess.run(
        group.enter([*PYTHON, "import sys; print(sys.argv[1:])", "a b", "$HOME", '"']),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == repr(["a b", "$HOME", '"'])


def test_no_cgroup_file_system_means_none(tmp_path):
    assert MemoryCgroup.create(64 * MIB, mount=tmp_path) is None


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (1, {"memory.limit_in_bytes": f"{64 * MIB}", "memory.memsw.limit_in_bytes": f"{64 * MIB}"}),
        (2, {"memory.max": f"{64 * MIB}", "memory.swap.max": "0"}),
    ],
)
def test_the_limit_is_whole_pages_and_holds_with_swap(tmp_path, version, files):
    for name in files:
        (tmp_path / name).touch()
    MemoryCgroup(tmp_path, version)._limit(64 * MIB + 1)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_a_cgroup_that_takes_no_limit_is_given_back(tmp_path, monkeypatch):
    def refused(self, limit):
        raise PermissionError

    (tmp_path / "cgroup.controllers").touch()
    monkeypatch.setattr(MemoryCgroup, "_limit", refused)
    assert MemoryCgroup.create(64 * MIB, mount=tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["cgroup.controllers"]


def test_removing_twice_is_harmless(tmp_path):
    path = tmp_path / "group"
    path.mkdir()
    made = MemoryCgroup(path, 2)
    made.remove()
    made.remove()
    assert not path.exists()
    assert made.peak_bytes() is None
    assert made.oom_kills() == 0


def test_what_a_killed_parent_left_is_swept(group):
    left = group.path.parent / f"tightfit-{2**22 + 1}-1"
    left.mkdir()
    other = MemoryCgroup.create(64 * MIB)
    other.remove()
    assert not left.exists()
    assert group.path.exists()


def test_what_a_process_that_lived_on_left_is_removed_when_the_next_is_made(group):
    """A run that is given up on: its process is ended later."""
    made = MemoryCgroup.create(64 * MIB)
    with subprocess.Popen(made.enter(["sleep", "60"])) as process:
        while not (made.path / "cgroup.procs").read_text():
            time.sleep(0.01)
        made.remove()
        assert made.path.exists()
        process.kill()
        process.wait()
    MemoryCgroup.create(64 * MIB).remove()
    assert not made.path.exists()


def test_a_group_that_the_kernel_still_clears_away_is_waited_for(tmp_path, monkeypatch):
    """No process is in it any more, and yet it cannot be removed for longer than a second."""
    path = tmp_path / "group"
    path.mkdir()
    (path / "cgroup.procs").touch()
    later = time.monotonic() + 1.3
    rmdir = Path.rmdir

    def busy(self):
        if time.monotonic() < later:
            raise OSError(errno.EBUSY, "busy")
        (path / "cgroup.procs").unlink()
        rmdir(self)

    monkeypatch.setattr(Path, "rmdir", busy)
    MemoryCgroup(path, 2).remove()
    assert not path.exists()
