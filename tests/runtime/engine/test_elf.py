"""Stub libraries that are written byte by byte, as the dynamic linker takes them."""

from __future__ import annotations

import ctypes
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tightfit.runtime.engine.start.elf import read_shared_object, stub_library

LIBRARIES = Path(torch.__file__).parent / "lib"
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="stubs are made for x86-64 alone")


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_a_shared_object_is_read() -> None:
    found = read_shared_object(LIBRARIES / "libtorch_python.so")
    assert {"libtorch.so", "libc.so.6"} <= set(found.needed)
    assert "PyList_New" in found.undefined
    assert not found.undefined & found.defined
    assert "THPVariableClass" in found.defined
    assert "__gmon_start__" not in found.undefined  # weak: it may be missing


def test_it_is_read_as_binutils_read_it(tmp_path: Path) -> None:
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("no nm here")
    lines = subprocess.check_output([tool, "-D", LIBRARIES / "libc10.so"], text=True).splitlines()
    rows = [line.rpartition("@@")[0] or line.rpartition("@")[0] or line for line in lines]
    found = read_shared_object(LIBRARIES / "libc10.so")
    assert found.undefined == {row.split()[-1] for row in rows if row.split()[-2] == "U"}
    assert found.defined == {row.split()[-1] for row in rows if len(row.split()) == 3 and row.split()[1] != "A"}


@pytest.mark.parametrize("content", [b"#!/bin/sh\n" + bytes(80), b"\x7fELF\x02\x01\x01" + b"\xff" * 80])
def test_what_is_no_shared_object_is_told(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, "library.so", content)
    with pytest.raises(ValueError, match="shared object"):
        read_shared_object(path)


def test_a_stub_satisfies_what_needs_its_name(tmp_path: Path) -> None:
    needs = write(tmp_path, "needs.so", stub_library("libtightfit_needs.so", needed=("libtightfit_absent.so.9",)))
    with pytest.raises(OSError, match=r"libtightfit_absent\.so\.9: cannot open shared object file"):
        ctypes.CDLL(str(needs))
    ctypes.CDLL(str(write(tmp_path, "any name", stub_library("libtightfit_absent.so.9"))))
    ctypes.CDLL(str(needs))


def test_symbols_are_zero_bytes_references_to_them_and_typeinfos(tmp_path: Path) -> None:
    names = ["tightfit_data", "_ZTIN8tightfit5KlassE", "tightfit_reference", "_ZTIN8tightfit5OtherE"]
    stub = stub_library(
        "libtightfit_symbols.so", needed=("libstdc++.so.6",), symbols=names, references={"tightfit_reference"}
    )
    library = ctypes.CDLL(str(write(tmp_path, "symbols.so", stub)))
    data = (ctypes.c_char * 4096).in_dll(library, "tightfit_data")
    assert bytes(data) == bytes(4096)
    library.tightfit_reference.restype = ctypes.c_void_p
    assert library.tightfit_reference() == ctypes.addressof(data)
    kinds = ctypes.CDLL("libstdc++.so.6")
    table = ctypes.addressof(ctypes.c_char.in_dll(kinds, "_ZTVN10__cxxabiv117__class_type_infoE"))
    for name in names[1::2]:
        kind, text = (ctypes.c_void_p * 2).in_dll(library, name)
        assert kind == table + 16
        assert text is not None
        assert ctypes.string_at(text) == name.removeprefix("_ZTI").encode()
    assert not hasattr(library, "tightfit_other")


def test_an_object_of_a_stub_has_a_typeinfo_and_virtual_functions_that_return(tmp_path: Path) -> None:
    names = ["tightfit_made", "tightfit_beside"]
    stub = stub_library(
        "libtightfit_made.so", needed=("libstdc++.so.6",), symbols=names, constructors=["tightfit_made"]
    )
    library = ctypes.CDLL(str(write(tmp_path, "made.so", stub)))
    made = (ctypes.c_void_p * 2)(1, 2)
    library.tightfit_made.argtypes = [ctypes.c_void_p]
    library.tightfit_made(ctypes.addressof(made))
    table, beside = made
    assert (table is not None, beside) == (True, 2)
    offset, kind, *functions = (ctypes.c_void_p * 34).from_address(table - 16)
    assert offset is None
    _, text = (ctypes.c_void_p * 2).from_address(kind)
    assert ctypes.string_at(text) == b"8tightfit"
    for function in functions:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(ctypes.addressof(made))
    assert list(made) == [table, 2]


def test_a_function_that_is_called_all_the_same_ends_the_process(tmp_path: Path) -> None:
    path = write(tmp_path, "f.so", stub_library("libtightfit_f.so", symbols=["tightfit_f"]))
    code = f"import ctypes; library = ctypes.CDLL({str(path)!r}); print('loaded', flush=True); library.tightfit_f()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "loaded\n")
