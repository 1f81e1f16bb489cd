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
from places import SOURCES

from tightfit.runtime.common.files import cache_directory, takes_files
from tightfit.runtime.engine.start import page_out, process
from tightfit.runtime.supervision import training_process

MIB = 1 << 20
WATCHED = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static long waits;
ssize_t pwrite(int file, const void *from, size_t count, off_t offset) {
    long done = syscall(SYS_pwrite64, file, from, count, offset);
    return waits += done > 0 ? done : 0, done;
}
static void tell(void) {
    char line[32];
    int told = open(getenv("WATCHED"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (told < 0 || write(told, line, snprintf(line, sizeof line, "%ld\\n", waits)) < 0) abort();
    close(told), waits = 0;
}
int sync_file_range(int file, off64_t offset, off64_t count, unsigned how) {
    if (how == (SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) && !offset && !count) tell();
    return syscall(SYS_sync_file_range, file, offset, count, how);
}
int fdatasync(int file) { return tell(), syscall(SYS_fdatasync, file); }
"""
"""Tells how many bytes were written until the disk had been waited for."""

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
needs_disk = pytest.mark.skipif(
    shutil.which("cc") is None or not takes_files(cache_directory()), reason="no C compiler, or a cache in memory"
)


def build(folder: Path, source: str) -> Path:
    written, path = folder / "page_out.c", folder / "cold.so"
    written.write_text(source)
    flags = [*page_out.FLAGS, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", path, written], check=True)
    return path


def judged(path: Path) -> str:
    """What a fresh process says of a library; nothing where it dies of it."""
    done = subprocess.run(
        [sys.executable, "-m", "tightfit.runtime.engine.start.page_out", path],
        env={**os.environ, page_out.VARIABLE: "", "PYTHONPATH": str(SOURCES)},
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
        "import json, resource, subprocess, sys; told = json.loads(subprocess.check_output(sys.argv[1:]).splitlines()[0])\n"
        "print(json.dumps([told, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))"
    )
    words = [sys.executable, "-c", small, *training_process.command("--floor")]
    told, most = json.loads(subprocess.check_output(words, env=process.child_environment(2) | extra))
    return told, most


# --- what moves -------------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_heap_is_the_same_while_it_moves_and_afterwards(tmp_path):
    assert json.loads(judged(build(tmp_path, page_out.SOURCE.read_text()))) == ["heap"]


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if (write_out(low, high)) return;", ""),  # given back without being written
        ("from - heap);\n        if (count < 0", "from - heap + 64);\n        if (count < 0"),
        ("if (kind != WRITTEN) continue;", "continue;"),  # what is written again stays
        ("if (write_out(end, now)) return;", ""),
        ("MAP_PRIVATE | MAP_FIXED, file, from - heap)", "MAP_PRIVATE | MAP_FIXED, file, 0)"),
        ("give_back(pagemap, heap, end, 0, MADV_PAGEOUT)", "madvise(heap, end - heap, MADV_DONTNEED)"),
    ],
)
def test_a_library_that_does_otherwise_is_not_used(tmp_path, monkeypatch, right, wrong):
    source = page_out.SOURCE.read_text()
    assert right in source
    changed = tmp_path / "page_out.c"
    changed.write_text(source.replace(right, wrong))
    monkeypatch.delenv(page_out.VARIABLE, raising=False)
    monkeypatch.setattr(page_out, "SOURCE", changed)
    monkeypatch.setattr(page_out, "takes_files", lambda _: True)
    assert page_out.library(tmp_path / "cache") == ""


@needs_compiler
def test_no_more_than_a_piece_waits_for_the_disk(tmp_path):
    """A slow disk's pages count against the cgroup until it has them, and too many end the run."""
    watched = tmp_path / "watched.c"
    watched.write_text(WATCHED)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "watched.so", watched], check=True)
    path = build(tmp_path, page_out.SOURCE.read_text())
    subprocess.run(
        [sys.executable, "-m", "tightfit.runtime.engine.start.page_out", path],
        env={
            **os.environ,
            page_out.VARIABLE: "",
            "PYTHONPATH": str(SOURCES),
            "LD_PRELOAD": str(tmp_path / "watched.so"),
            "WATCHED": str(tmp_path / "waits"),
        },
        capture_output=True,
        check=True,
    )
    waits = [int(line) for line in (tmp_path / "waits").read_text().split()]
    assert sum(waits) > 8 * MIB
    assert max(waits) <= 4 * MIB


@needs_disk
def test_a_lean_process_holds_fifty_megabytes_less():
    moved, most = floor()
    stays, _ = floor(**{page_out.VARIABLE: ""})
    assert moved["tables_on_disk"]
    assert not stays["tables_on_disk"]
    assert moved["resident_bytes"] < stays["resident_bytes"] - 50 * MIB
    assert moved["import_peak_bytes"] < stays["import_peak_bytes"] - 50 * MIB
    # Nothing comes back when the process ends.
    assert most < moved["import_peak_bytes"]


@pytest.mark.slow
@needs_disk
def test_what_has_only_been_read_is_given_back_later_too():
    code = """
import ctypes, pathlib, re
from tightfit.runtime.engine.start import lean_torch
lean_torch.load()
from tightfit.runtime.engine.start import page_out
from tightfit.runtime.engine.device.resident import memory
maps = pathlib.Path("/proc/self/maps").read_text()
low, high = (int(end, 16) for end in re.search(r"([0-9a-f]+)-([0-9a-f]+) rw-p .*native.*deleted", maps).groups())
ctypes.string_at(low, high - low)
before = memory().file
page_out.release()
print(high - low, before - memory().file)
"""
    done = lean(code)
    assert done.returncode == 0, done.stderr
    moved, released = map(int, done.stdout.split())
    assert moved > 40 * MIB
    assert released > moved - 8 * MIB  # but for what has been written


@pytest.mark.slow
@needs_disk
def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.delenv(page_out.VARIABLE, raising=False)
    library = page_out.library(tmp_path)
    before = sorted(Path(library).parent.iterdir())
    told, _ = floor(**{page_out.VARIABLE: library})
    assert told["tables_on_disk"]
    assert sorted(Path(library).parent.iterdir()) == before


@pytest.mark.slow
@needs_disk
def test_the_start_may_be_tried_in_another_process_first():
    """An unknown version of torch is tried in a forked process, which moves its own heap: a cap holds for it as
    well.
    """
    done = lean(
        "import resource; from tightfit.runtime.engine.start import lean_torch; lean_torch.torch_interface.untried = str; print(lean_torch.load());"
        "import torch; print(torch.ops.aten.add.Tensor(torch.ones(2), 1).tolist());"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    loaded, answer, most = done.stdout.splitlines()
    assert (loaded, answer) == ("lean", "[2.0, 2.0]"), done.stderr
    assert int(most) < 85 * MIB


@pytest.mark.slow
@needs_disk
def test_a_plain_start_moves_nothing_and_says_so():
    told, _ = floor(TIGHTFIT_TORCH="plain")
    assert told["torch"] == "plain"
    assert not told["tables_on_disk"]


@needs_disk
def test_a_heap_that_shrinks_and_grows_is_kept():
    code = (
        "import ctypes, time; from tightfit.runtime.engine.start import page_out\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "page_out.START_BYTES = 12 << 20\n"  # less than Python itself: it moves at every look
        "kept = []\n"
        "def block(n):\n"
        "    at = libc.malloc(ctypes.c_size_t(60000)); ctypes.memset(at, n % 251, 60000); return at\n"
        "with page_out.moving():\n"
        "    for turn in range(12):\n"
        "        kept.append((block(turn), turn))\n"
        "        many = [block(n) for n in range(100)]\n"
        "        time.sleep(0.004)\n"
        "        for at in many: libc.free(ctypes.c_void_p(at))\n"
        "        libc.malloc_trim(ctypes.c_size_t(0))\n"
        "        kept.extend((block(n), n) for n in range(20))\n"
        "        time.sleep(0.004)\n"
        "print(all(ctypes.string_at(at, 60000) == bytes([n % 251]) * 60000 for at, n in kept))"
    )
    done = lean(code)
    assert done.stdout == "True\n", done.stderr


@needs_disk
def test_what_is_still_a_copy_of_a_file_is_given_back_where_it_may_be_written_too(tmp_path):
    """Symbol tables lie in writable mappings where a library was edited after it had been linked, as those of PyTorch
    for CUDA are.
    """
    (tmp_path / "library").write_bytes(b"a" * 8 * 4096)
    code = (
        "import ctypes, mmap; from array import array; from tightfit.runtime.engine.start import page_out\n"
        f"with open({str(tmp_path / 'library')!r}, 'rb') as file:\n"
        "    pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)\n"
        "sum(pages[:])\n"
        "pages[3 * 4096] = ord('b')\n"
        "with page_out.moving(): pass\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(pages))\n"
        "with open('/proc/self/pagemap', 'rb') as file:\n"
        "    file.seek(at // 4096 * 8); there = [entry >> 63 for entry in array('Q', file.read(64))]\n"
        "print(there, pages[:] == b'a' * 3 * 4096 + b'b' + b'a' * (5 * 4096 - 1))"
    )
    done = lean(code)
    assert done.stdout == "[0, 0, 0, 1, 0, 0, 0, 0] True\n", done.stderr


@needs_compiler
def test_a_disk_that_refuses_at_the_end_is_told_and_loses_nothing(tmp_path):
    """As one does that took the writes and has no room for them after all."""
    source = page_out.SOURCE.read_text()
    refusing = source.replace("fdatasync(file)", "(errno = ENOSPC)")
    assert refusing != source
    library = build(tmp_path, refusing)
    code = (
        "from tightfit.runtime.engine.start import page_out; from tightfit.runtime.common.errors import RunError\n"
        "blocks = [bytes([n % 251]) * 3000 for n in range(8000)]\n"
        "try:\n"
        "    with page_out.moving(): pass\n"
        "except RunError as error: print(error)\n"
        "print(all(block == bytes([n % 251]) * 3000 for n, block in enumerate(blocks)))"
    )
    words, whole = lean(code, **{page_out.VARIABLE: str(library)}).stdout.splitlines()
    assert "No space left on device; free 65 MB there, or name another cache" in words
    assert whole == "True"


# --- where it cannot be -----------------------------------------------------------------------------------------------


def test_without_a_compiler_all_stays_in_memory(tmp_path, monkeypatch):
    monkeypatch.delenv(page_out.VARIABLE, raising=False)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert page_out.library(tmp_path) == ""


@needs_compiler
@pytest.mark.parametrize("system", ["tmpfs", "ramfs", "nfs4", "cifs", "fuse.sshfs"])
def test_a_cache_in_memory_or_elsewhere_is_no_place_for_it(tmp_path, monkeypatch, system):
    monkeypatch.delenv(page_out.VARIABLE, raising=False)
    monkeypatch.setattr(
        "tightfit.runtime.common.files._file_system", lambda folder: {tmp_path: system}.get(folder, "ext4")
    )
    assert page_out.library(tmp_path / "to" / "be" / "made") == ""


def test_a_folder_that_takes_no_files_is_no_place_for_it(tmp_path, monkeypatch):
    """Another user's: the cache itself takes files, and the folder that they would lie in does not."""
    monkeypatch.delenv(page_out.VARIABLE, raising=False)
    native = tmp_path / "native"
    native.mkdir()
    monkeypatch.setattr(os, "access", lambda folder, _: folder != native)
    assert takes_files(tmp_path)
    assert not takes_files(native)
    assert not takes_files(native / "new")
    assert page_out.library(tmp_path) == ""


@needs_disk
def test_a_full_disk_is_told_and_loses_nothing():
    code = (
        "import resource; from tightfit.runtime.engine.start import page_out\n"
        "from tightfit.runtime.common.errors import RunError\n"
        "blocks = [bytes([n % 251]) * 3000 for n in range(8000)]\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))\n"
        "try:\n"
        "    with page_out.moving(): pass\n"
        "except RunError as error:\n"
        "    print(error)\n"
        "print(all(block == bytes([n % 251]) * 3000 for n, block in enumerate(blocks)))"
    )
    done = lean(code)
    words, whole = done.stdout.splitlines()
    assert "File too large; free 65 MB there, or name another cache with TIGHTFIT_CACHE" in words
    assert whole == "True"


@needs_disk
def test_a_run_that_finds_the_disk_full_ends_with_words(tmp_path):
    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    done = subprocess.run(
        training_process.command("--floor"),
        env=process.child_environment(2),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=small,
    )
    assert done.returncode == 4
    assert "free 65 MB there, or name another cache with TIGHTFIT_CACHE" in done.stderr
    assert "Traceback" not in done.stderr


@needs_disk
def test_a_second_thread_is_seen():
    code = (
        "import threading; from tightfit.runtime.engine.start import page_out; from tightfit.runtime.common.errors import RunError\n"
        "wait = threading.Event()\n"
        "try:\n"
        "    with page_out.moving(): threading.Thread(target=wait.wait).start()\n"
        "except RunError as error: print(error)\n"
        "wait.set()"
    )
    assert "the process has a second thread; set TIGHTFIT_COLD= " in lean(code).stdout


@needs_disk
def test_the_clock_and_its_signal_are_as_before():
    code = (
        "import signal; from tightfit.runtime.engine.start import page_out; signal.signal(signal.SIGALRM, lambda *_: print('ours'))\n"
        "try:\n"
        "    with page_out.moving():\n"
        "        print(signal.getitimer(signal.ITIMER_REAL)[1] > 0)\n"
        "        raise KeyError('of the block')\n"
        "except KeyError as error: print(error)\n"
        "print(signal.getitimer(signal.ITIMER_REAL)); signal.raise_signal(signal.SIGALRM)"
    )
    assert lean(code).stdout.splitlines() == ["True", "'of the block'", "(0.0, 0.0)", "ours"]


def test_a_library_that_is_gone_is_told(tmp_path):
    code = (
        "from tightfit.runtime.engine.start import page_out; from tightfit.runtime.common.errors import RunError\n"
        "try:\n"
        "    with page_out.moving(): pass\n"
        "except RunError as error: print(error)"
    )
    done = lean(code, **{page_out.VARIABLE: str(tmp_path / "cold.so")})
    assert "cold.so is gone or damaged" in done.stdout
