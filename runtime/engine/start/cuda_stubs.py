"""Makes and loads stub libraries in the place of CUDA's, which a training process on the CPU never calls: 113 MiB less.

PyTorch's default builds for Linux link `torch._C` against hundreds of megabytes of CUDA libraries, whose relocated
tables stay in memory. If a library of the same name (SONAME) is loaded already, the dynamic linker takes that one; so
tiny libraries with those names are loaded first. They define the symbols that PyTorch's own libraries want of CUDA's:
data are zero, and a function ends the process if it is called after all. The stubs are made once per installed PyTorch,
into the cache; where they cannot be made, CUDA's own libraries are loaded. The floor is measured in the same way, so
that predictions hold either way.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from contextlib import suppress
from pathlib import Path

from tightfit.runtime.common import machine_code
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.interpreter import command, python_path

VARIABLE = "TIGHTFIT_CUDA_STUBS"
"""Environment variable with the folder of the stub libraries; empty: use none."""
SYMBOLS = "libtightfit_cuda_symbols.so"
"""The stub that defines symbols. The stubs with CUDA's names depend on it, so that the linker searches it last."""
CUDA = ("libtorch_cuda", "libtorch_nvshmem", "libc10_cuda", "libcu", "libnv", "libnccl")
"""Prefixes of the names of the libraries that are replaced."""
REFERENCES = ("_ZN4c10d15get_gil_checkerEv",)
"""Functions that are called while PyTorch's libraries load and return a reference to a variable (the only one, 2.9 to
2.14)."""
CONSTRUCTORS = ("_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb",)
"""Constructors that are called while PyTorch's C bindings for exchanges between processes are made: the options of
NCCL, which nobody looks at.
"""
LIBRARY = "libtorch_python.so"
"""The PyTorch library that depends on all the others."""
JUDGED_SECONDS = 120


def load() -> None:
    """Load the stubs from the folder in `VARIABLE`; call it before loading PyTorch. Raises RunError if they are
    gone.
    """
    folder = os.environ.get(VARIABLE, "")
    if not folder:
        return
    try:
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name != SYMBOLS):
            ctypes.CDLL(str(path))
    except OSError as error:
        raise RunError(f"{folder} is gone or damaged; the cache was cleaned meanwhile, try again") from error


def in_use() -> bool:
    """Whether this process was told to use stubs."""
    return bool(os.environ.get(VARIABLE))


def built_for_cuda() -> bool:
    """Whether the installed PyTorch brings CUDA's libraries, which a process that imports all of PyTorch loads."""
    libraries = _libraries()
    return libraries is not None and any(path.name.startswith(CUDA) for path in libraries.glob("lib*"))


def folder(cache: Path) -> str:
    """Folder in `cache` of the stubs for the installed PyTorch, made now if need be; empty if none are needed
    or work.
    """
    if os.environ.get(VARIABLE) is not None:
        return os.environ[VARIABLE]
    import subprocess

    libraries = _libraries()
    # Stubs are made for x86-64 alone.
    if libraries is None or not built_for_cuda() or platform.machine() != "x86_64":
        return ""
    path = machine_code.folder(cache) / f"cuda-stubs-{_key(libraries)}"
    if not path.is_dir():
        # On a read-only cache or a test process that hangs, go on without stubs. Another process may also have been
        # first.
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            _build(libraries, path)
    return str(path) if path.is_dir() and any(path.iterdir()) else ""


def _libraries() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) / "lib" if spec and spec.submodule_search_locations else None


def _key(libraries: Path) -> str:
    """Beginning of a sha256 of the installed libraries' names, sizes and times, and of the code that makes stubs."""
    import hashlib

    parts = [str(libraries), *(Path(__file__).with_name(name).read_text() for name in ("cuda_stubs.py", "elf.py"))]
    for path in sorted(libraries.glob("lib*.so*")):
        parts += [path.name, str(path.stat().st_size), str(path.stat().st_mtime_ns)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(libraries: Path, destination: Path) -> None:
    """Make the folder `destination` with the stubs, or empty if a fresh process cannot load PyTorch's libraries with
    them.

    Raises OSError, ValueError and SubprocessError.
    """
    import tempfile

    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        staging = Path(scratch) / destination.name
        staging.mkdir()
        for name, content in stubs(libraries).items():
            (staging / name).write_bytes(content)
        if not _serve(staging):
            for path in staging.iterdir():
                path.unlink()
        staging.rename(destination)


def stubs(libraries: Path) -> dict[str, bytes]:
    """Contents of the stub libraries by file name, for the PyTorch in the folder `libraries`.

    Raises OSError, and ValueError if one of PyTorch's libraries cannot be read.
    """
    from tightfit.runtime.engine.start.elf import SharedObject, read_shared_object, stub_library

    own_libraries: dict[str, SharedObject] = {}
    replaced: set[str] = set()
    pending = [LIBRARY, "libtorch_global_deps.so"]
    while pending:
        name = pending.pop()
        if name.startswith(CUDA):
            replaced.add(name)
        elif name not in own_libraries and (libraries / name).exists():
            own_libraries[name] = read_shared_object(libraries / name)
            pending += own_libraries[name].needed
    system = (ctypes.CDLL(None), ctypes.CDLL("libstdc++.so.6"))
    missing = set().union(*(library.undefined for library in own_libraries.values()))
    missing -= set().union(*(library.defined for library in own_libraries.values()))
    symbols = sorted(name for name in missing if not any(_defines(library, name) for library in system))
    special = {"references": REFERENCES, "constructors": CONSTRUCTORS}
    symbol_stub = stub_library(SYMBOLS, needed=("libstdc++.so.6",), symbols=symbols, **special)
    return {SYMBOLS: symbol_stub, **{name: stub_library(name, needed=(SYMBOLS,)) for name in sorted(replaced)}}


class _SymbolInfo(ctypes.Structure):
    """``Dl_info`` of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _defines(library: ctypes.CDLL, name: str) -> bool:
    """Whether a symbol is found through `library`, but not in a CUDA library.

    This process may have loaded those with all of PyTorch, and the global search then finds their symbols too.
    """
    try:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p)
    except AttributeError:
        return False
    info = _SymbolInfo()
    found = ctypes.CDLL(None).dladdr(address, ctypes.byref(info))
    return not (found and info.file and os.path.basename(os.fsdecode(info.file)).startswith(CUDA))


def _serve(folder: Path) -> bool:
    """Whether PyTorch's libraries load with these stubs, tried in a process of its own because it may crash."""
    import subprocess

    environment = {**os.environ, VARIABLE: str(folder), "PYTHONPATH": python_path()}
    process = subprocess.run(
        command("tightfit.runtime.engine.start.cuda_stubs"),
        check=False,
        capture_output=True,
        timeout=JUDGED_SECONDS,
        env=environment,
    )
    return process.returncode == 0


if __name__ == "__main__":
    load()
    found = _libraries()
    assert found is not None
    ctypes.CDLL(str(found / LIBRARY))
    os._exit(0)
