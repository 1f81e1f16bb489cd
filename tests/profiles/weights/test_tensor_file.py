"""Safetensors files whose tensors are read a part at a time: the same numbers as the safetensors package reads, none of
a damaged file.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tightfit.profiles.weights.tensor_file import PIECE, TORCH_NAMES, FileParts, TensorFile, contents
from tightfit.runtime.common.errors import InputError


@pytest.mark.parametrize("dtype", TORCH_NAMES.values())
def test_parts_of_a_tensor_are_those_that_safetensors_reads(dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    values = {
        "matrix": (torch.arange(-30, 33).view(7, 9) % 100).to(kind),
        "vector": torch.arange(5).to(kind),
        "number": torch.tensor(3).to(kind),
        "none": torch.empty(0, 4, dtype=kind),
    }
    save_file(values, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as reference:
        assert list(file.tensors) == list(reference.keys())
        for name in values:
            part = reference.get_slice(name)
            assert file.tensors[name] == (part.get_dtype(), tuple(part.get_shape()))
        matrix = reference.get_slice("matrix")
        assert torch.equal(file.rows("matrix", 2, 6), matrix[2:6])
        assert torch.equal(file.columns("matrix", 3, 8), matrix[:, 3:8])
        assert torch.equal(file.columns("matrix", 0, 9), matrix[:])
        assert torch.equal(file.rows("vector", 1, 4), reference.get_slice("vector")[1:4])
    for name, tensor in values.items():
        whole = file.tensor(name).whole()
        assert (whole.dtype, whole.shape) == (kind, tensor.shape)
        assert torch.equal(whole, tensor)
        assert file.tensor(name).numbers() == tensor.view(-1).tolist()
        assert b"".join(file.chunks(name)) == file.tensor(name).content() == bytes(contents(tensor))


def test_a_large_tensor_comes_in_pieces(tmp_path: Path) -> None:
    values = torch.randint(0, 256, (2 * PIECE + 10,), dtype=torch.uint8)
    save_file({"x": values}, tmp_path / "x.safetensors")
    pieces = list(TensorFile(tmp_path / "x.safetensors").chunks("x"))
    assert [len(piece) for piece in pieces] == [PIECE, PIECE, 10]
    assert b"".join(pieces) == values.numpy().tobytes()


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN: dict[str, tuple[dict[str, Any], int]] = {
    "a byte too few": ({"a": entry()}, 7),
    "a byte too many": ({"a": entry()}, 9),
    "another size": ({"a": entry(shape=(3,))}, 8),
    "an unknown type": ({"a": entry("F33")}, 8),
    "an overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "a gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "a late start": ({"a": entry(offsets=(4, 12))}, 12),
    "an end before the start": ({"a": entry(shape=(0,), offsets=(8, 0))}, 8),
    "a negative size": ({"a": entry(shape=(-2,), offsets=(8, 0))}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, 8),
    "words for numbers": ({"a": entry(shape=("2",))}, 8),
    "no object": ({"a": [1, 2]}, 8),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_safetensors_refuses_is_refused(case: str, tmp_path: Path) -> None:
    header, size = BROKEN[case]
    text, path = json.dumps(header).encode(), tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(SafetensorError):
        safe_open(path, framework="pt")
    with pytest.raises(InputError, match=r"x\.safetensors: not a readable safetensors file \(.*\); copy it again"):
        TensorFile(path, "copy it again")


def test_a_type_that_kernels_do_not_read_is_named(tmp_path: Path) -> None:
    text = json.dumps({"a": entry("F8_E4M3", (8,))}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.tensor("a").content() == bytes(8)
    with pytest.raises(InputError, match="tensor 'a' is F8_E4M3, which cannot be read"):
        file.rows("a", 0, 2)
    with pytest.raises(InputError, match="tensor 'a' is F8_E4M3, which cannot be read"):
        file.tensor("a").numbers()


def test_a_file_that_is_cut_off_while_it_is_open_is_told(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(64)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 100)
    with pytest.raises(InputError, match=r"x\.safetensors: it ends at byte 100 where \d+ is due"):
        file.rows("x", 0, 64)


def test_a_file_is_closed_with_its_object(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    parts = FileParts(tmp_path / "x")
    assert parts.read(1, 2) == b"bc"
    descriptor = parts.descriptor
    del parts
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
