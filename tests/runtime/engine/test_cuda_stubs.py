"""Stubs in the place of libraries that PyTorch links and never calls. In the build for the CPU, `libshm` plays those of
CUDA; in that for CUDA it is replaced beside them.
"""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tightfit.profiles import api
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.engine.start import cuda_stubs, process
from tightfit.runtime.engine.start.elf import stub_library

LIBRARIES = Path(torch.__file__).parent / "lib"
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="stubs are made for x86-64 alone")


@pytest.fixture(scope="module")
def shared_memory() -> Iterator[None]:
    """Replace libshm, a library that torch._C links, and of which the start calls one function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(cuda_stubs.VARIABLE, raising=False)
        patch.setattr(cuda_stubs, "CUDA", ("libshm.", *cuda_stubs.CUDA))
        patch.setattr(cuda_stubs, "REFERENCES", ("_Z11libshm_initPKc", *cuda_stubs.REFERENCES))
        yield


@pytest.fixture(scope="module")
def stubs(shared_memory: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(cuda_stubs.folder(tmp_path_factory.mktemp("cache")))


def lean(code: str, folder: str) -> dict[str, Any]:
    environment = process.child_environment(2) | {cuda_stubs.VARIABLE: folder}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


KERNELS = """
import json
from tightfit.runtime.engine.start import lean_torch
mode = lean_torch.load()
import torch
x = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
y = torch.ops.aten.mm.default(x, x.t()).tolist()
maps = open("/proc/self/maps").read().split()
print(json.dumps({"mode": mode, "y": y, "libraries": sorted({name for name in maps if "libshm" in name})}))
"""


@pytest.mark.slow
def test_pytorch_starts_with_stubs_and_computes_the_same(stubs: Path) -> None:
    assert {"libshm.so", cuda_stubs.SYMBOLS} <= {path.name for path in stubs.iterdir()}
    stubbed, whole = lean(KERNELS, str(stubs)), lean(KERNELS, "")
    assert stubbed["libraries"] == [f"{stubs}/libshm.so"]
    assert whole["libraries"] == [str(LIBRARIES / "libshm.so")]
    assert (stubbed["mode"], whole["mode"]) == ("lean", "lean")
    assert stubbed["y"] == whole["y"]


def test_the_same_are_made_in_a_process_that_has_loaded_what_they_replace(stubs: Path) -> None:
    """As `profile` has, which imports all of PyTorch: no symbol of CUDA's libraries is missing there."""
    ctypes.CDLL(str(LIBRARIES / "libshm.so"), mode=ctypes.RTLD_GLOBAL)
    assert hasattr(ctypes.CDLL(None), "_Z11libshm_initPKc")
    made = cuda_stubs.stubs(LIBRARIES)
    assert made == {path.name: path.read_bytes() for path in stubs.iterdir()}


def test_they_are_made_once(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_stubs, "stubs", lambda _: pytest.fail("made again"))
    assert cuda_stubs.folder(stubs.parent.parent) == str(stubs)
    assert list(stubs.parent.iterdir()) == [stubs]


@pytest.mark.parametrize(
    "made",
    [
        {cuda_stubs.SYMBOLS: b"\x7fELF\x02\x01\x01"},  # damaged
        {"libshm.so": stub_library("libshm.so")},  # without the symbols
    ],
)
def test_stubs_that_do_not_serve_are_not_used(
    shared_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, bytes]
) -> None:
    monkeypatch.setattr(cuda_stubs, "stubs", lambda _: made)
    assert cuda_stubs.folder(tmp_path) == ""
    monkeypatch.setattr(cuda_stubs, "stubs", lambda _: pytest.fail("made again"))
    assert cuda_stubs.folder(tmp_path) == ""


def test_a_build_for_the_cpu_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cuda_stubs.VARIABLE, raising=False)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_python.so").touch()
    monkeypatch.setattr(cuda_stubs, "_libraries", lambda: tmp_path / "lib")
    assert cuda_stubs.folder(tmp_path / "cache") == ""
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_takes_nothing_is_done_without(
    shared_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "native").touch()
    assert cuda_stubs.folder(tmp_path) == ""


def test_another_process_may_have_been_first(
    shared_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(libraries: Path, place: Path) -> None:
        place.mkdir(parents=True)
        (place / cuda_stubs.SYMBOLS).touch()
        raise FileExistsError(place)

    monkeypatch.setattr(cuda_stubs, "_build", build)
    assert Path(cuda_stubs.folder(tmp_path)).parent == tmp_path / "native"


def test_a_check_that_hangs_is_made_again(shared_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_stubs, "JUDGED_SECONDS", 0.0)
    assert cuda_stubs.folder(tmp_path) == ""
    assert list((tmp_path / "native").iterdir()) == []


def test_another_machine_is_done_without(shared_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cuda_stubs.folder(tmp_path) == ""


def test_stubs_that_are_gone_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_stubs.VARIABLE, str(tmp_path / "cuda-stubs-1"))
    with pytest.raises(RunError, match="cuda-stubs-1 is gone or damaged; the cache was cleaned meanwhile, try again"):
        cuda_stubs.load()


@pytest.mark.parametrize(("variable", "value"), [(cuda_stubs.VARIABLE, "cuda-stubs-1"), ("TIGHTFIT_TORCH", "plain")])
def test_a_profile_with_another_start_is_another(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    """The floor that it states is not that of this one."""
    source: Any = SimpleNamespace(fingerprint="model", config={})
    monkeypatch.delenv("TIGHTFIT_TORCH", raising=False)
    monkeypatch.setenv(cuda_stubs.VARIABLE, "")
    before = api._fingerprint(source)
    monkeypatch.setenv(variable, value)
    assert api._fingerprint(source) != before
