from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess

import pytest

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import WriteBehind, in_memory, read_all, remove_orphans, write_whole


def test_writes_text_and_bytes_and_makes_folders(tmp_path):
    assert write_whole(tmp_path / "a/b.txt", "é").read_bytes() == b"\xc3\xa9"
    assert write_whole(tmp_path / "a/b.txt", b"\x00").read_bytes() == b"\x00"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_a_place_that_is_a_folder(tmp_path):
    with pytest.raises(InputError) as caught:
        write_whole(tmp_path, "x")
    assert str(caught.value) == f"{tmp_path}: cannot be written (Is a directory); name another place with -o"


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "plan.json", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError) as caught:
        write_whole(path, "new and longer")
    assert str(caught.value) == f"{path}: the disk is full (14 bytes were to be written); free space and try again"
    assert caught.value.exit_code == 4
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_reads_that_take_less_are_gone_on_with_up_to_the_end_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "bytes"
    path.write_bytes(content := os.urandom(100))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: preadv(descriptor, [views[0][:7]], offset))
    with path.open("rb") as file:
        whole, beyond = bytearray(60), bytearray(60)
        assert read_all(file.fileno(), memoryview(whole), 20) == 60
        assert whole == content[20:80]
        assert read_all(file.fileno(), memoryview(beyond), 70) == 30
        assert beyond == content[70:] + bytes(30)
        assert read_all(file.fileno(), memoryview(beyond), 100) == 0


def cached_pages(path):
    """How many pages of a file are in the page cache (mincore)."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages) == 0
        del first
    return sum(page & 1 for page in pages)


def test_what_is_written_behind_does_not_stay_in_the_page_cache(tmp_path):
    if in_memory(tmp_path):
        pytest.skip("the files of this folder are kept in memory")
    path = tmp_path / "bytes"
    with path.open("wb", buffering=0) as file:
        behind = WriteBehind(file.fileno(), 1 << 20)
        for _ in range(15):
            file.write(bytes(1 << 18))
            behind.wrote(1 << 18)
        assert 0 < cached_pages(path) <= (1 << 20) // mmap.PAGESIZE
        behind.finish()
    assert cached_pages(path) == 0


def test_orphans_of_processes_that_are_gone_are_removed_and_no_others(tmp_path):
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / f".model.{gone}.partial").mkdir()
    (tmp_path / f".model.{gone}.partial" / "part").touch()
    (tmp_path / f".model.{gone}.earlier.partial").touch()
    kept = [f".model.{os.getpid()}.partial", f".other.{gone}.partial", f"model.{gone}.partial", ".model.x.partial"]
    for name in kept:
        (tmp_path / name).touch()
    remove_orphans(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
