"""Processes of our own: none starts with the working folder on its path, and none puts what is installed before the
standard library.
"""

from __future__ import annotations

import os
import site
import subprocess

from places import ROOT, SOURCES

from tightfit.runtime.common.interpreter import command, python_path


def test_the_working_folder_is_not_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shown.py").write_text("import json, sys; print(json.dumps(sys.path))\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('a file of the working folder')\n")
    # An empty entry is the working folder too: what `PYTHONPATH=$PYTHONPATH:/a/folder` leaves of one that was not set.
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{tmp_path / 'elsewhere'}")
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command("shown"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(SOURCES) in done.stdout
    assert f'"{tmp_path}"' not in done.stdout
    assert '""' not in done.stdout


def test_packages_that_are_installed_are_found_without_being_named(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"/a/folder{os.pathsep}")
    assert python_path() == f"{SOURCES}{os.pathsep}/a/folder"
    monkeypatch.setattr(site, "getsitepackages", lambda: ["/another", str(SOURCES)])
    assert python_path() == "/a/folder"
    monkeypatch.delenv("PYTHONPATH")
    assert python_path() == ""


def test_there_is_one_way_to_start_a_process_of_ours():
    """Who starts Python otherwise may start it with the working folder on its path."""
    starting = [
        path.relative_to(ROOT).as_posix()
        for folder in ("planner", "profiles", "runtime")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "sys.executable" in path.read_text()
    ]
    assert starting == [
        "runtime/common/interpreter.py",
        "runtime/engine/start/lean_torch.py",
    ]  # the latter runs its own command line again
