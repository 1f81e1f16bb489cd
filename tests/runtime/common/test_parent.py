"""What works for a process ends with it, however that ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from damage import CONFIG

PATIENCE = 120.0


def measuring(process):
    """The process that measures, once it has begun."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert process.poll() is None
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(OSError, psutil.Error):  # others come and go
                begun = "libtorch" in Path(f"/proc/{child.pid}/maps").read_text()
                if begun and child.cmdline()[-1:] == ["tightfit.profiles.measuring.worker"]:
                    return child
        time.sleep(0.01)
    raise AssertionError("nothing is measured")


@pytest.mark.slow
def test_what_measures_ends_with_a_killed_profile(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    process = subprocess.Popen(
        [sys.executable, "-m", "tightfit.runtime.cli.main", "profile", "config.json", "--seq", "16", "--force"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    child = measuring(process)
    child.suspend()  # so that it cannot notice by itself that nobody reads what it says
    process.kill()
    process.wait()
    _, left = psutil.wait_procs([child], timeout=20)
    # What it was handed to may never ask what became of it, as in some containers.
    left = [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    for one in left:
        one.kill()
    assert left == []
