"""What a command holds itself is known before each of its phases, and refused in words where it has no place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tightfit.profiles import worker_process
from tightfit.runtime.cli.phase_memory import (
    BYTES_PER_JSON,
    LEARNING,
    LOADED_BYTES,
    expect_phase,
)
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.device.resident import memory

MIB = 1 << 20


@pytest.fixture
def foreseen(monkeypatch: pytest.MonkeyPatch):
    """What was noted of a phase, in a process that holds nothing yet."""

    def of(*given) -> int:
        monkeypatch.setattr(worker_process, "MEMORY_OF_WORKERS", type(worker_process.MEMORY_OF_WORKERS)())
        expect_phase("learning", *given)
        return worker_process.predicted_bytes()

    return of


def near(size: int) -> object:
    """Pages come and go between two looks at what this process holds."""
    return pytest.approx(size, abs=MIB)


def test_files_that_are_read_count(foreseen, tmp_path: Path):
    (tmp_path / "plan.json").write_bytes(bytes(3 * MIB))
    files = [tmp_path / "plan.json", tmp_path / "none.json"]
    assert foreseen(LEARNING, files) == near(LOADED_BYTES[LEARNING] + 3 * MIB * BYTES_PER_JSON[LEARNING])


def test_a_phase_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_process, "free_memory", lambda **given: (MIB, "1.0 MiB are left of the cgroup x"))
    monkeypatch.setitem(LOADED_BYTES, LEARNING, memory().resident + 30 * MIB)
    with pytest.raises(
        InputError, match=r"learning takes [23]\d\.\d MiB, and 1\.0 MiB are left of the cgroup x; end other"
    ):
        expect_phase("learning", LEARNING, [])
