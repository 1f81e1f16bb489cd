"""Compiled unpacking: the same bits as PyTorch's path, and a fallback to it whatever goes wrong."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.runtime.common import machine_code
from tightfit.runtime.engine.weights import native, native_judge
from tightfit.runtime.engine.weights.layout import BLOCKS, Entry, group_bytes
from tightfit.runtime.engine.weights.store import unpack

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "unpack.so"
    subprocess.run(
        ["cc", *native.FLAGS, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", path, native.SOURCE], check=True
    )
    return str(path)


@pytest.fixture(scope="module")
def built(library):
    return machine_code.load_functions(library, native.PREFIX, native.FORMATS, native.ARGUMENTS)


@needs_compiler
@pytest.mark.parametrize("name", native.FORMATS)
@settings(max_examples=25)
@given(
    numbers=st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    half=st.integers(1, 35),
)
def test_the_same_bits_as_pytorch(built, name, numbers, rows, groups, half):
    kind, dtype = name.rsplit("_", 1)
    group = BLOCKS[kind][0] if kind in BLOCKS else 2 * half
    size = group_bytes(kind, group)
    packed = native_judge.random_groups(kind, group, rows * groups, seed=rows)
    wide = kind in ("nf4", "int8")
    if kind == "mxfp4":  # whose scale is a power of two, a byte of its own
        packed[:, 0] = torch.arange(len(packed)) * 7 % 253
    for number, place in enumerate(native_judge.SCALES[kind] if kind != "mxfp4" else ()):
        values = torch.tensor([numbers[(row + number) % len(numbers)] for row in range(len(packed))])
        first = place % size - (3 if wide else 1)
        scale = values.to(torch.float32 if wide else torch.float16).view(-1, 1).view(torch.uint8)
        packed[:, first : first + scale.shape[1]] = scale
    entry = Entry(name="w", shape=(rows, groups * group), format=kind, group=group)
    expected, out = (torch.full(entry.shape, 7.0, dtype=getattr(torch, dtype)) for _ in range(2))
    unpack(entry, packed.view(-1), expected)
    built[name](packed.data_ptr(), out.data_ptr(), rows * groups, group, size)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@needs_compiler
@pytest.mark.parametrize("name", native.DOTS)
@settings(max_examples=8)
@given(rows=st.integers(1, 600), groups=st.integers(1, 5), half=st.integers(1, 40))
def test_products_with_packed_rows_are_those_with_the_rows_unpacked(library, name, rows, groups, half):
    dot = machine_code.load_functions(library, native.PREFIX, [name], native.DOT_ARGUMENTS)[name]
    kind = name.removeprefix(native.DOT)
    group = BLOCKS[kind][0] if kind in BLOCKS else 2 * half
    packed = native_judge.random_groups(kind, group, rows * groups, seed=rows)
    entry = Entry(name="w", shape=(rows, groups * group), format=kind, group=group)
    weight, out = torch.empty(entry.shape), torch.full((rows + 1,), 7.0)
    unpack(entry, packed.view(-1), weight)
    x = torch.randn(groups * group, generator=torch.Generator().manual_seed(half))
    arguments = (packed.data_ptr(), x.data_ptr(), out.data_ptr(), rows, groups, group, packed.shape[1])
    dot(*arguments)
    exact, most = weight.double() @ x.double(), weight.double().abs() @ x.double().abs()
    assert ((out[:rows].double() - exact).abs() <= 1e-6 * most + 1e-30).all()
    assert out[rows] == 7.0
    again = out.clone()
    dot(*arguments)
    assert torch.equal(out, again)


@needs_compiler
def test_it_is_built_once_and_judged(tmp_path, monkeypatch):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    path = native.library(tmp_path)
    assert path
    assert set(native.functions(path)) <= set(native.FORMATS)
    monkeypatch.setattr(subprocess, "run", None)  # nothing is compiled again
    assert native.library(tmp_path) == path


def test_without_a_compiler_pytorch_does_the_work(tmp_path, monkeypatch):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.library(tmp_path) == ""
    assert native.functions("") == {}


@pytest.mark.slow
@needs_compiler
def test_a_library_that_differs_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    wrong = tmp_path / "unpack.c"
    wrong.write_text(native.SOURCE.read_text().replace("packed + g * stride", "packed + (groups - 1 - g) * stride"))
    monkeypatch.setattr(native, "SOURCE", wrong)
    assert native.library(tmp_path) == ""
