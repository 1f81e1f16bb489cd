"""What PyTorch's start leaves lies in a file: the same bytes, 50 MiB less, and words where it cannot be."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from profiles.files import cache_directory, takes_files
from runtime import cold, process

MIB = 1 << 20

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
needs_disk = pytest.mark.skipif(
    shutil.which("cc") is None or not takes_files(cache_directory()), reason="no C compiler, or a cache in memory"
)


def build(folder: Path, source: str) -> Path:
    written, path = folder / "cold.c", folder / "cold.so"
    written.write_text(source)
    flags = [*cold.FLAGS, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", path, written], check=True)
    return path


def judged(path: Path) -> str:
    """What a fresh process says of a library; nothing where it dies of it."""
    done = subprocess.run(
        [sys.executable, "-m", "runtime.cold", path],
        env={**os.environ, cold.VARIABLE: "", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def lean(code: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=process.child_environment(2) | extra,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def floor(**extra: str) -> tuple[dict[str, int], int]:
    """The floor, and the most that its process ever held."""
    small = (
        "import json, resource, subprocess, sys; told = json.loads(subprocess.check_output(sys.argv[1:]))\n"
        "print(json.dumps([told, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))"
    )
    words = [sys.executable, "-c", small, *process.command("--floor")]
    told, most = json.loads(subprocess.check_output(words, env=process.child_environment(2) | extra))
    return told, most


# --- what moves ---------------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_heap_is_the_same_while_it_moves_and_afterwards(tmp_path):
    assert json.loads(judged(build(tmp_path, cold.SOURCE.read_text()))) == ["heap"]


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("kind == WRITTEN && write_out(low, high)", "kind == WRITTEN && 0"),  # given back without being written
        ("from - heap);", "from - heap + 64);"),  # written elsewhere
        ("madvise(low, high - low, MADV_DONTNEED)", "(void)low"),  # nothing is given back
        ("MAP_PRIVATE | MAP_FIXED, file, end - heap)", "MAP_PRIVATE | MAP_FIXED, file, 0)"),
    ],
)
def test_a_library_that_does_otherwise_is_not_used(tmp_path, monkeypatch, right, wrong):
    source = cold.SOURCE.read_text()
    assert right in source
    changed = tmp_path / "cold.c"
    changed.write_text(source.replace(right, wrong))
    monkeypatch.delenv(cold.VARIABLE, raising=False)
    monkeypatch.setattr(cold, "SOURCE", changed)
    monkeypatch.setattr(cold, "takes_files", lambda _: True)
    assert cold.library(tmp_path / "cache") == ""


@needs_disk
def test_a_lean_process_holds_fifty_megabytes_less():
    moved, most = floor()
    stays, _ = floor(**{cold.VARIABLE: ""})
    assert moved["tables_on_disk"]
    assert not stays["tables_on_disk"]
    assert moved["resident_bytes"] < stays["resident_bytes"] - 50 * MIB
    assert moved["import_peak_bytes"] < stays["import_peak_bytes"] - 50 * MIB
    # Nothing comes back when the process ends.
    assert most < moved["import_peak_bytes"]


@needs_disk
def test_nothing_is_left_behind():
    folder = Path(process.child_environment(2)[cold.VARIABLE]).parent
    before = sorted(folder.iterdir())
    floor()
    assert sorted(folder.iterdir()) == before


@needs_disk
def test_the_start_may_be_tried_in_another_process_first():
    """An unknown version of torch is tried in a forked process, which moves its own heap."""
    done = lean(
        "from runtime import lean_torch; lean_torch.KNOWN = (); print(lean_torch.load());"
        "import torch; print(torch.ops.aten.add.Tensor(torch.ones(2), 1).tolist())"
    )
    assert done.stdout.splitlines() == ["lean", "[2.0, 2.0]"], done.stderr


# --- where it cannot be -------------------------------------------------------------------------------------------------


def test_without_a_compiler_all_stays_in_memory(tmp_path, monkeypatch):
    monkeypatch.delenv(cold.VARIABLE, raising=False)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert cold.library(tmp_path) == ""


@needs_compiler
def test_a_cache_in_memory_is_no_place_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv(cold.VARIABLE, raising=False)
    monkeypatch.setattr("profiles.files.in_memory", lambda folder: folder == tmp_path)
    assert cold.library(tmp_path / "to" / "be" / "made") == ""


def test_a_folder_that_takes_no_files_is_no_place_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, _: folder != tmp_path)
    assert not takes_files(tmp_path)
    assert not takes_files(tmp_path / "new")


@needs_disk
def test_a_full_disk_is_told_and_loses_nothing():
    code = (
        "import resource; from runtime import cold\n"
        "from profiles.errors import RunError\n"
        "blocks = [bytes([n % 251]) * 3000 for n in range(8000)]\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))\n"
        "try:\n"
        "    with cold.moving(): pass\n"
        "except RunError as error:\n"
        "    print(error)\n"
        "print(all(block == bytes([n % 251]) * 3000 for n, block in enumerate(blocks)))"
    )
    done = lean(code)
    words, whole = done.stdout.splitlines()
    assert "does not take the 65 MB that PyTorch's start leaves: File too large; free space there" in words
    assert whole == "True"


@needs_disk
def test_a_run_that_finds_the_disk_full_ends_with_words(tmp_path):
    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    done = subprocess.run(
        process.command("--floor"),
        env=process.child_environment(2),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=small,
    )
    assert done.returncode == 4
    assert "free space there, or name another cache with TIGHTFIT_CACHE" in done.stderr
    assert "Traceback" not in done.stderr


@needs_disk
def test_a_second_thread_is_seen():
    code = (
        "import threading; from runtime import cold; from profiles.errors import RunError\n"
        "wait = threading.Event()\n"
        "try:\n"
        "    with cold.moving(): threading.Thread(target=wait.wait).start()\n"
        "except RunError as error: print(error)\n"
        "wait.set()"
    )
    assert "the process has a second thread" in lean(code).stdout


@needs_disk
def test_the_clock_and_its_signal_are_as_before():
    code = (
        "import signal; from runtime import cold; signal.signal(signal.SIGALRM, lambda *_: print('ours'))\n"
        "try:\n"
        "    with cold.moving():\n"
        "        print(signal.getitimer(signal.ITIMER_REAL)[1] > 0)\n"
        "        raise KeyError('of the block')\n"
        "except KeyError as error: print(error)\n"
        "print(signal.getitimer(signal.ITIMER_REAL)); signal.raise_signal(signal.SIGALRM)"
    )
    assert lean(code).stdout.splitlines() == ["True", "'of the block'", "(0.0, 0.0)", "ours"]


def test_a_library_that_is_gone_is_told(tmp_path):
    code = (
        "from runtime import cold; from profiles.errors import RunError\n"
        "try:\n"
        "    with cold.moving(): pass\n"
        "except RunError as error: print(error)"
    )
    done = lean(code, **{cold.VARIABLE: str(tmp_path / "cold.so")})
    assert "cold.so is gone or damaged" in done.stdout
