"""Helpers for failure tests: a tiny model's data and settings, damaged files, full disks, leftovers of runs."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from reference import CONFIGS

from tightfit.runtime.supervision.cgroup import MOUNT, _parents

MIB = 1 << 20
CONFIG = {**CONFIGS["llama"], "num_hidden_layers": 1}
SEQ = 24
MEASURED = {"path": "model", "seq": SEQ, "batch": 2, "lora_rank": 4}
"""Request for the profile that the fixture `measured` made a service measure; a second such request hits the cache."""
ROWS = [
    {"prompt": "Is the fox quick? ", "completion": "positive"},
    {"prompt": "lazy dog? ", "completion": "negative"},
    {"prompt": "over ", "completion": "the moon"},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def files(folder):
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def opened_below(folder):
    """This process's open descriptors for files below a folder, deleted files included.

    Tests count these rather than all descriptors, because files that earlier tests left to the garbage collector may be
    closed at any time.
    """
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor used for this listing is closed by now
            if path.readlink().is_relative_to(folder):
                found.append(int(path.name))
    return found


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def cut(path, size):
    os.truncate(path, size)


def own_groups():
    """Memory cgroups that this process has made.

    Searches only where it makes them: elsewhere folders may vanish meanwhile.
    """
    return [group for parent, _ in _parents(MOUNT) for group in parent.glob(f"tightfit-{os.getpid()}-*")]


@contextmanager
def small_disk(path, size):
    """Mount a file system of `size` bytes at `path`."""
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here (that takes root and CAP_SYS_ADMIN)")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(disk, leave):
    filler = disk / "filler"
    filler.write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - leave))
    return filler
