"""Lines that another process adds to a file, read as they come."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tightfit.runtime.common.new_lines import NewLines


def test_each_line_comes_once_and_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = NewLines(path)
    assert list(lines) == []
    with path.open("w") as file:
        file.write('{"step": 1}\n{"st')
        file.flush()
        assert list(lines) == [{"step": 1}]
        assert list(lines) == []
        file.write('ep": 2}\n')
        file.flush()
        assert list(lines) == [{"step": 2}]


def test_a_file_that_was_replaced_is_read_anew_however_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    lines, later = NewLines(path), NewLines(path, skip=True)
    assert len(list(lines)) == 2
    assert list(later) == []
    (tmp_path / "new").write_text("".join(json.dumps({"step": step, "anew": True}) + "\n" for step in range(1, 4)))
    (tmp_path / "new").replace(path)
    for reader in (lines, later):
        assert [line["step"] for line in reader] == [1, 2, 3]
    os.truncate(path, path.read_text().index("\n") + 1)
    assert [line["step"] for line in lines] == [1]
