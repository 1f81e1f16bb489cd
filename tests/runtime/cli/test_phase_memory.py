"""What a command holds itself is known before each of its phases, and refused in words where it has no place."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tightfit.profiles import worker_process
from tightfit.runtime.cli.phase_memory import (
    BYTES_PER_JSON,
    LEARNING,
    LOADED_BYTES,
    READING,
    TOKENIZER_BYTES,
    expect_phase,
)
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.preparation import BYTES_PER_BYTE
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


def test_the_longest_line_counts(foreseen, tmp_path: Path):
    line = b'{"text": "' + bytes(100_000) + b'"}'
    (tmp_path / "a.jsonl").write_bytes(b"short\n" + line + b"\nshort")
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(b"short\n" * 400_000 + line + line)
    without = LOADED_BYTES[READING]
    assert foreseen(READING, [], ["random", None]) == near(without)
    for name, lines in (("a.jsonl", 1), ("b.jsonl.gz", 2)):
        tokenised = TOKENIZER_BYTES + BYTES_PER_BYTE * lines * len(line)
        assert foreseen(READING, [], ["random", str(tmp_path / name)]) == near(without + tokenised)


def test_a_line_without_a_place_is_left_to_who_tokenises_it(foreseen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It says which line it is, and what to do."""
    (tmp_path / "a.jsonl").write_bytes(bytes(MIB))
    monkeypatch.setattr(worker_process, "free_memory", lambda **given: (LOADED_BYTES[READING] + TOKENIZER_BYTES, "x"))
    assert foreseen(READING, [], [str(tmp_path / "a.jsonl")]) > BYTES_PER_BYTE * MIB


def test_nothing_is_foreseen_of_data_that_cannot_be_read(foreseen, tmp_path: Path):
    (tmp_path / "damaged.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    for name in ("damaged.jsonl.gz", "table.parquet", "missing.jsonl"):
        assert foreseen(READING, [], [str(tmp_path / name)]) == 0


def test_a_phase_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_process, "free_memory", lambda **given: (MIB, "1.0 MiB are left of the cgroup x"))
    monkeypatch.setitem(LOADED_BYTES, LEARNING, memory().resident + 30 * MIB)
    with pytest.raises(
        InputError, match=r"learning takes [23]\d\.\d MiB, and 1\.0 MiB are left of the cgroup x; end other"
    ):
        expect_phase("learning", LEARNING, [])
