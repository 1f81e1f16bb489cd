"""The weight store: exact values, slices, gathered rows, damage, full disks, and what the lean process pays for it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from reference import CONFIGS, VARIANTS

from tightfit.profiles.sources.random_weights import random_source
from tightfit.profiles.weights.describe import decoder_tensors, describe, packed_entry
from tightfit.profiles.weights.precision import Precision
from tightfit.profiles.weights.source import Source, SourceTensor
from tightfit.profiles.weights.store_file import (
    StoreWriter,
    build_store,
    finite_groups,
    pack_q4,
    pack_q8,
    pack_rows,
    q4_blocks,
)
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.weights import native_judge
from tightfit.runtime.engine.weights.layout import BLOCKS, MAGIC, PREAMBLE, VERSION
from tightfit.runtime.engine.weights.store import (
    CHUNK_ELEMENTS,
    WORKSPACE_BYTES,
    Entry,
    WeightStore,
    packed_bytes,
    unpack,
)

TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "q4.weight": ((300, 96), "q4"),
    "q8.weight": ((1000, 64), "q8"),
    "narrow.weight": ((40, 8), "q4"),
    "odd.weight": ((7, 13), "q4"),  # no group divides 13: bfloat16
    "raw.weight": ((33, 5), "float32"),
    "half.weight": ((20, 6), "float16"),
    "norm.weight": ((77,), "float32"),
    "scalar": ((), "float32"),
    "filter.weight": ((8, 3, 3, 3), "float32"),
    "count": ((), "int64"),
    "mask": ((3, 5), "bool"),
}


def aligned_buffer(size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def decode(entry: Entry, record: bytes) -> list[float]:
    """A row by the letter of the format's description, in Python floats; float32 rounding by struct."""
    if entry.format in ("float32", "float16"):
        code = {"float32": "f", "float16": "e"}[entry.format]
        return list(struct.unpack(f"<{entry.columns}{code}", record))
    values: list[float] = []
    size = entry.group // 2 + 4 if entry.format == "q4" else entry.group + 2
    for at in range(0, len(record), size):
        block = record[at : at + size]
        if entry.format == "q4":
            scale, minimum = struct.unpack("<2e", block[-4:])
            codes = [nibble for byte in block[:-4] for nibble in (byte & 15, byte >> 4)]
            values += [code * scale + minimum for code in codes]
        else:
            (scale,) = struct.unpack("<e", block[:2])
            values += [code * scale for code in struct.unpack(f"<{entry.group}b", block[2:])]
    return list(struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values)))


def original(name: str) -> torch.Tensor:
    shape, kind = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name) + sum(shape))
    if kind == "int64":
        return torch.tensor(2**40 + 3)
    values = torch.randn(shape, generator=generator) * 0.03
    return values > 0 if kind == "bool" else values


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mixed.store"
    entries = [packed_entry(name, shape, kind) for name, (shape, kind) in SHAPES.items()]
    with StoreWriter(file, entries, name="mixed", config={"model_type": "x"}, source={"kind": "test"}) as writer:
        for entry in entries:
            rows = original(entry.name).reshape(entry.rows, entry.columns)
            writer.write(entry.name, [pack_rows(entry, part) for part in rows.split(50)])
    return file


@pytest.fixture
def store(path: Path) -> Iterable[WeightStore]:
    with WeightStore.open(path) as opened:
        yield opened


def loaded(store: WeightStore, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(store.extent(name).shape, dtype=dtype)
    store.load(name, out)
    return out


@pytest.mark.parametrize(
    "name",
    [name for name, (_, kind) in SHAPES.items() if kind in ("q4", "q8", "float32", "float16") and name != "odd.weight"],
)
def test_unpacks_to_the_value_that_the_format_defines(store: WeightStore, path: Path, name: str) -> None:
    entry = store.entries[name]
    raw = path.read_bytes()[entry.offset : entry.offset + entry.bytes]
    expected = [
        value
        for row in range(entry.rows)
        for value in decode(entry, raw[row * entry.row_bytes : (row + 1) * entry.row_bytes])
    ]
    expected_tensor = torch.tensor(expected, dtype=torch.float64).float().view(entry.shape)
    assert torch.equal(loaded(store, name), expected_tensor)
    assert torch.equal(loaded(store, name, torch.bfloat16), expected_tensor.bfloat16())


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("q4.weight", 0.09),
        ("q8.weight", 0.006),
        ("narrow.weight", 0.06),
        ("odd.weight", 0.003),
        ("half.weight", 0.0005),
    ],
)
def test_rounding_error_is_what_the_bits_allow(store: WeightStore, name: str, bound: float) -> None:
    values = original(name)
    error = (loaded(store, name) - values).norm() / values.norm()
    assert bound / 3 < error < bound


@pytest.mark.parametrize("name", ["raw.weight", "norm.weight", "scalar", "filter.weight", "count", "mask"])
def test_raw_tensors_come_back_as_they_were(store: WeightStore, name: str) -> None:
    values = original(name)
    assert store.entries[name].shape == tuple(values.shape)
    assert torch.equal(loaded(store, name, values.dtype), values)


def test_float16_becomes_bfloat16_by_one_rounding_of_any_number_of_elements() -> None:
    values = torch.randn(CHUNK_ELEMENTS + 77, generator=torch.Generator().manual_seed(0)).half()
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    unpack(Entry(name="w", shape=tuple(values.shape), format="float16"), values.view(torch.uint8), out)
    assert torch.equal(out, values.bfloat16())


def test_a_matrix_larger_than_a_chunk_unpacks_as_its_rows_do() -> None:
    entry = Entry(name="w", shape=(3 * CHUNK_ELEMENTS // 1024 + 5, 1024), format="q8", group=32)
    packed = pack_q8(torch.randn(entry.shape, generator=torch.Generator().manual_seed(0)), 32)
    whole, single = torch.empty(entry.shape), torch.empty(1, entry.columns)
    unpack(entry, packed.view(-1), whole)
    for row in (0, 127, 128, 129, entry.rows - 1):
        unpack(entry, packed[row], single)
        assert torch.equal(whole[row], single[0])


@settings(max_examples=60)
@given(data=st.data())
def test_slices_and_gathered_rows_are_rows_of_the_whole(path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["q4.weight", "q8.weight", "narrow.weight", "odd.weight", "raw.weight"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    with WeightStore.open(path) as store:
        whole = loaded(store, name, dtype)
        start = data.draw(st.integers(0, len(whole) - 1))
        stop = data.draw(st.integers(start + 1, len(whole)))
        part = f"{name}[{start}:{stop}]"
        staging = (
            aligned_buffer(store.packed_bytes(part))
            if data.draw(st.booleans())
            else torch.empty(store.packed_bytes(part) + 8, dtype=torch.uint8)[8:]
        )
        store.read_into(part, staging)
        out = torch.empty(stop - start, whole.shape[1], dtype=dtype)
        store.unpack(part, staging, out)
        assert torch.equal(out, whole[start:stop])
        rows = torch.tensor(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=40)), dtype=torch.int64)
        gathered = torch.full((len(rows), whole.shape[1]), torch.nan, dtype=dtype)
        store.gather_rows(name, rows, gathered)
        assert torch.equal(gathered, whole[rows])


def test_staging_is_a_whole_number_of_pages_and_covers_the_rows(store: WeightStore) -> None:
    for name, entry in store.entries.items():
        assert entry.offset % 4096 == 0
        assert store.packed_bytes(name) % 4096 == 0
        assert 0 <= store.packed_bytes(name) - entry.bytes < 4096
    assert store.packed_bytes("q4.weight[100:101]") in (4096, 8192)


def test_reads_from_many_threads_do_not_disturb_each_other(store: WeightStore) -> None:
    expected = {name: loaded(store, name) for name in ("q4.weight", "q8.weight", "raw.weight")}
    failures: list[str] = []

    def work(name: str) -> None:
        staging, out = aligned_buffer(store.packed_bytes(name)), torch.empty_like(expected[name])
        for _ in range(50):
            store.read_into(name, staging)
            store.unpack(name, staging, out)
            rows = torch.tensor([3, 1, 3])
            gathered = torch.empty(3, out.shape[1])
            store.gather_rows(name, rows, gathered)
            if not (torch.equal(out, expected[name]) and torch.equal(gathered, out[rows])):
                failures.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("name", ["nothing.weight", "q4.weight[0:301]", "q4.weight[5:5]", "norm.weight[0:3]"])
def test_names_of_another_model_are_refused(store: WeightStore, name: str) -> None:
    with pytest.raises(InputError, match="the plan was made for another model") as caught:
        store.packed_bytes(name)
    assert caught.value.exit_code == 2


def test_rows_outside_the_table_are_refused(store: WeightStore) -> None:
    with pytest.raises(
        InputError, match=r"rows 2 to 300 asked of 'q4.weight', which has 300; the data was tokenised for another model"
    ):
        store.gather_rows("q4.weight", torch.tensor([2, 300]), torch.empty(2, 96))


def test_wrong_buffers_are_refused(store: WeightStore) -> None:
    with pytest.raises(ValueError, match="must be contiguous uint8 of 20480 bytes"):
        store.read_into("q4.weight", torch.empty(4096, dtype=torch.uint8))
    staging = aligned_buffer(store.packed_bytes("q4.weight"))
    store.read_into("q4.weight", staging)
    with pytest.raises(ValueError, match=r"must be contiguous of shape \[300, 96\]"):
        store.unpack("q4.weight", staging, torch.empty(300, 95))


# Damage


def copy_of(path: Path, tmp_path: Path) -> tuple[Path, bytearray]:
    return tmp_path / path.name, bytearray(path.read_bytes())


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("where", ["first", "last"])
def test_one_flipped_bit_is_found_when_the_tensor_is_first_read(
    path: Path, tmp_path: Path, name: str, where: str
) -> None:
    file, data = copy_of(path, tmp_path)
    with WeightStore.open(path) as store:
        entry = store.entries[name]
    data[entry.offset if where == "first" else entry.offset + entry.bytes - 1] ^= 1
    file.write_bytes(data)
    with WeightStore.open(file) as store:
        staging = aligned_buffer(store.packed_bytes(name))
        with pytest.raises(InputError) as caught:
            store.read_into(name, staging)
        assert (
            str(caught.value)
            == f"{file}: tensor {name!r} is damaged (checksum differs); delete the file and profile the model again"
        )
        assert caught.value.exit_code == 2
        if len(entry.shape) == 2:
            row = 0 if where == "first" else entry.rows - 1
            with pytest.raises(InputError, match="is damaged"):
                store.gather_rows(name, torch.tensor([row]), torch.empty(1, entry.columns))
        with pytest.raises(InputError, match=f"tensor '{name}' is damaged"):
            store.verify()


def test_slices_check_the_segments_that_they_cover(path: Path, tmp_path: Path) -> None:
    file, data = copy_of(path, tmp_path)
    with WeightStore.open(path) as store:
        entry = store.entries["q8.weight"]
    assert entry.segment_rows == 128
    data[entry.offset + 300 * entry.row_bytes] ^= 64
    file.write_bytes(data)
    with WeightStore.open(file) as store:
        staging = aligned_buffer(store.packed_bytes("q8.weight"))
        store.read_into("q8.weight[0:256]", staging)
        store.gather_rows("q8.weight", torch.tensor([0, 255, 384, 999]), torch.empty(4, 64))
        with pytest.raises(InputError, match=r"'q8.weight' is damaged"):
            store.read_into("q8.weight[256:384]", staging)
        with pytest.raises(InputError, match=r"'q8.weight' is damaged"):
            store.gather_rows("q8.weight", torch.tensor([383]), torch.empty(1, 64))


def test_a_slice_that_begins_and_ends_anywhere_is_checked(path: Path, tmp_path: Path) -> None:
    """Segments of 128 rows, of which the slice has parts too, and a first row that lies inside a page."""
    file, data = copy_of(path, tmp_path)
    with WeightStore.open(path) as store:
        entry, whole = store.entries["q8.weight"], loaded(store, "q8.weight")
    for start, stop in ((100, 640), (1, 1000), (384, 999)):
        with WeightStore.open(path) as store:  # which has checked nothing yet
            assert torch.equal(loaded(store, f"q8.weight[{start}:{stop}]"), whole[start:stop])
    data[entry.offset + 639 * entry.row_bytes] ^= 64
    file.write_bytes(data)
    for start, stop in ((100, 640), (600, 700), (512, 520), (638, 641)):
        with WeightStore.open(file) as store, pytest.raises(InputError, match=r"'q8.weight' is damaged"):
            loaded(store, f"q8.weight[{start}:{stop}]")


@pytest.mark.parametrize("how", ["a page at a time", "not past the page cache"])
def test_a_file_system_of_few_talents_is_read_all_the_same(
    path: Path, store: WeightStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    whole, read = loaded(store, "q8.weight"), os.preadv
    with WeightStore.open(path) as other:

        def moved(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if how == "a page at a time":
                return read(descriptor, [buffers[0][:4096]], offset)
            if descriptor == other._direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return read(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", moved)
        staging, out = aligned_buffer(other.packed_bytes("q8.weight")), torch.empty(whole.shape)
        other.read_into("q8.weight", staging)
        other.unpack("q8.weight", staging, out)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("byte", [8, 20, 40, 200])
def test_a_damaged_header_is_refused(path: Path, tmp_path: Path, byte: int) -> None:
    file, data = copy_of(path, tmp_path)
    data[byte] ^= 4
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"weight store of version 6|the header is truncated or damaged") as caught:
        WeightStore.open(file)
    assert str(file) in str(caught.value)


def test_the_fingerprint_is_of_the_header_and_the_checksums(path: Path) -> None:
    """As it always was: plans hold it, and those made before go on to run."""
    text, table = header_of(path)
    header = json.loads(text)
    said = json.dumps([header["tensors"], header["config"]], sort_keys=True).encode()
    with WeightStore.open(path) as store:
        assert store.fingerprint == hashlib.sha256(said + table).hexdigest()
        assert {"name": store.name, "config": store.config, "source": store.source} == {
            key: value for key, value in header.items() if key != "tensors"
        }
        assert list(store.entries) == list(header["tensors"])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: json.dumps(json.loads(text)).encode(),  # with spaces
        lambda text: b"\n" + text,
        lambda text: text + b"}",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"tensors"', b'"others"'),
        lambda text: text.replace(b'"config"', b'"others"'),
        lambda text: text.replace(b'"q4"', b"4", 1),
        lambda text: text.replace(b'"q4"', b'"q7"', 1),
        lambda text: b"[]",
        lambda text: b"",
        lambda text: b"\xff" + text,
    ],
)
def test_a_header_of_something_else_is_refused(path: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Its checksum is right."""
    text, table = header_of(path)
    other = change(text)
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(other), len(table) // 4, zlib.crc32(other + table))
    (tmp_path / "x.store").write_bytes(preamble + other + table + bytes(1 << 20))
    with pytest.raises(InputError, match=r"the header is not that of a weight store .*; delete the file"):
        WeightStore.open(tmp_path / "x.store")


def header_of(path: Path) -> tuple[bytes, bytes]:
    """Its text, and the table of checksums behind it."""
    raw = path.read_bytes()
    _, _, length, segments, _ = PREAMBLE.unpack(raw[: PREAMBLE.size])
    body = raw[PREAMBLE.size :]
    return body[:length], body[length : length + 4 * segments]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "not a weight store"),
        (20, "not a weight store"),
        (100, "the header is truncated or damaged"),
        (-4096, "truncated, tensor 'mask' ends at byte"),
    ],
)
def test_a_truncated_store_is_refused(path: Path, tmp_path: Path, keep: int, message: str) -> None:
    file, data = copy_of(path, tmp_path)
    file.write_bytes(data[:keep])
    with pytest.raises(InputError, match=message):
        WeightStore.open(file)


def test_a_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.store: No such file or directory; profile the model again"):
        WeightStore.open(tmp_path / "none.store")


def test_a_store_that_shrinks_under_its_reader_is_an_input_error(path: Path, tmp_path: Path) -> None:
    file, data = copy_of(path, tmp_path)
    file.write_bytes(data)
    with WeightStore.open(file) as store:
        os.truncate(file, store.entries["mask"].offset)
        with pytest.raises(InputError, match="truncated while reading tensor 'mask' at byte"):
            store.load("mask", torch.empty(3, 5, dtype=torch.bool))


# Packing


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32), scale=st.floats(1e-4, 100), shift=st.floats(-5, 5), group=st.sampled_from([8, 16, 32])
)
def test_q4_is_never_worse_than_rounding_to_the_range(seed: int, scale: float, shift: float, group: int) -> None:
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(seed)) * scale + shift * scale
    out = torch.empty_like(x)
    unpack(Entry(name="x", shape=(6, 96), format="q4", group=group), pack_q4(x, group).view(-1), out)
    groups = x.view(-1, group)
    low = groups.amin(1, keepdim=True)
    step = (groups.amax(1, keepdim=True) - low) / 15
    step, low = step.half().float(), low.half().float()
    simple = ((groups - low) / step).round().clamp(0, 15) * step + low
    assert torch.all(
        (out.view(-1, group) - groups).square().sum(1) <= (simple - groups).square().sum(1) * 1.0001 + 1e-12
    )


@pytest.mark.parametrize(("power", "share"), [(1, 0.84), (3, 0.56)])
def test_q4_takes_from_the_error_of_rounding_to_the_range(power: int, share: float) -> None:
    """Of normal weights, and of such with a few far from the others, which are cut to the last code."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) ** power
    out = torch.empty_like(x)
    unpack(Entry(name="x", shape=(64, 96), format="q4", group=32), pack_q4(x, 32).view(-1), out)
    groups = x.view(-1, 32)
    low = groups.amin(1, keepdim=True)
    step = (groups.amax(1, keepdim=True) - low) / 15
    simple = ((groups - low) / step).round() * step + low
    error = (out.view(-1, 32) - groups).square().sum()
    assert error < share * (simple - groups).square().sum()
    once = torch.empty_like(x)
    unpack(Entry(name="x", shape=(64, 96), format="q4", group=32), pack_q4(x, 32, (1.0,)).view(-1), once)
    assert error < 0.98 * (once - x).square().sum()  # searching beats what one start is refitted to


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32))
def test_q4_keeps_values_that_are_4_bit_already(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (64, 32), generator=generator, dtype=torch.uint8)
    codes[:, 0], codes[:, 31] = 0, 15
    scale = torch.exp2(torch.randint(-12, 0, (64, 1), generator=generator).half())
    minimum = -torch.randint(0, 16, (64, 1), generator=generator).half() * scale
    entry = Entry(name="x", shape=(64, 32), format="q4", group=32)
    values, again = torch.empty(64, 32), torch.empty(64, 32)
    unpack(entry, q4_blocks(codes, scale, minimum).view(-1), values)
    unpack(entry, pack_q4(values, 32).view(-1), again)
    assert torch.equal(values, again)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), scale=st.floats(1e-3, 1e3))
def test_q8_is_within_half_a_step(seed: int, scale: float) -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)) * scale
    out = torch.empty_like(x)
    unpack(Entry(name="x", shape=(16, 32), format="q8", group=32), pack_q8(x, 32).view(-1), out)
    step = x.abs().amax(1, keepdim=True) / 127
    assert torch.all((out - x).abs() <= step * 0.57)  # half a step, and 127 times the scale's own rounding


def test_constant_and_zero_groups_survive() -> None:
    x = torch.cat([torch.zeros(1, 32), torch.full((1, 32), 0.25), torch.full((1, 32), -3.0)])
    for kind, pack in (("q4", pack_q4), ("q8", pack_q8)):
        out = torch.empty_like(x)
        unpack(Entry(name="x", shape=(3, 32), format=kind, group=32), pack(x, 32).view(-1), out)
        assert torch.allclose(out, x, rtol=1e-3)


def test_values_below_what_a_scale_can_say_keep_their_sign() -> None:
    """float16 rounds the scale of these to two thirds of itself: the codes end where a byte does."""
    values = torch.linspace(-1, 1, 32)[None] * (1.4 * 127 * 2**-24)
    out = torch.empty(1, 32)
    unpack(Entry(name="w", shape=(1, 32), format="q8", group=32), pack_q8(values, 32).view(-1), out)
    assert (out * values > 0).all()


def one_tensor(entry: Entry, rows: torch.Tensor) -> Source:
    tensor = SourceTensor(entry=entry, rows=lambda start, stop: rows[start:stop], origin="a.safetensors: tensor 'k'")
    return Source(
        name="one", kind="huggingface", path="", config={}, fingerprint="one", has_weights=True,
        entries={entry.name: entry}, tensors=lambda: [tensor],
    )  # fmt: skip


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["q4", "q8", "bfloat16", "float32"])
def test_nan_and_infinity_are_refused_by_file_and_tensor(kind: str, bad: float, tmp_path: Path) -> None:
    rows = torch.ones(40, 32)
    rows[37, 5] = bad
    said = r"a\.safetensors: tensor 'k' holds NaN or infinity, first in row 37; the file is damaged or its training diverged"
    with pytest.raises(InputError, match=said):
        build_store(one_tensor(packed_entry("w", (40, 32), kind), rows), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_refused_where_scales_are_float16(tmp_path: Path) -> None:
    rows = torch.full((2, 32), -1e6)
    with pytest.raises(InputError, match=r"'k' holds values above 65504, too large for 4 or 8 bit; use base='16bit'"):
        build_store(one_tensor(packed_entry("w", (2, 32), "q4"), rows), tmp_path)
    assert build_store(one_tensor(packed_entry("w", (2, 32), "bfloat16"), rows), tmp_path).exists()


@pytest.mark.parametrize("kind", native_judge.SCALES)
def test_a_scale_that_is_not_finite_is_found_in_every_format(kind: str) -> None:
    group = BLOCKS[kind][0] if kind in BLOCKS else 32
    entry = Entry(name="w", shape=(3, group), format=kind, group=group)
    packed = native_judge.random_groups(kind, group, 3)
    assert finite_groups(entry, packed)
    if kind == "mxfp4":  # whose scale is a power of two, a byte of its own
        for exponent in (0, 252, 253, 255):
            packed[1, 0] = exponent
            assert finite_groups(entry, packed) == (exponent <= 252)
        return
    for place in native_judge.SCALES[kind]:
        for bad in (0x7C, 0x7F, 0xFF):
            damaged = packed.clone()
            damaged[1, place], damaged[1, place - 1] = bad, 0x81
            assert finite_groups(entry, damaged) == (kind in ("nf4", "int8") and bad == 0x7C)


# Building


def source_of(config: dict[str, object], tmp_path: Path, seed: int = 0) -> Source:
    return random_source(config, tmp_path / "tiny.json", seed=seed)


def test_a_store_is_built_once_with_progress_and_built_again_when_damaged(tmp_path: Path) -> None:
    source, steps = source_of(TINY, tmp_path), []
    file = build_store(source, tmp_path / "cache", lambda *step: steps.append(step))
    total = sum(entry.bytes for entry in source.entries.values())
    assert [stage for stage, _, _ in steps] == ["pack"] * len(source.entries)
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})
    assert steps[-1] == ("pack", total, total)
    before = file.stat().st_mtime_ns
    assert build_store(source, tmp_path / "cache") == file
    assert file.stat().st_mtime_ns == before
    os.truncate(file, file.stat().st_size - 4096)
    assert build_store(source, tmp_path / "cache") == file
    WeightStore.open(file).verify()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [file.name]


def test_a_store_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().suffix)
        fsync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        done.append("named")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    build_store(source_of(TINY, tmp_path), tmp_path / "cache")
    assert done == [".partial", "named", ""]  # the file, its name, the folder


def test_fingerprints_follow_the_weights(tmp_path: Path) -> None:
    prints = []
    for directory, seed in (("a", 0), ("b", 0), ("c", 1)):
        prints.append(WeightStore.open(build_store(source_of(TINY, tmp_path, seed), tmp_path / directory)).fingerprint)
    assert prints[0] == prints[1] != prints[2]
    turned = source_of(TINY | {"rope_theta": 5000.0}, tmp_path)
    assert WeightStore.open(build_store(turned, tmp_path / "d")).fingerprint != prints[0]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    source = source_of(TINY, tmp_path)

    def tensors() -> Iterable[SourceTensor]:
        yield from list(source.tensors())[:5]
        raise InputError("the source broke")

    broken = Source(**{**{name: getattr(source, name) for name in source.__dataclass_fields__}, "tensors": tensors})
    with pytest.raises(InputError, match="the source broke"):
        build_store(broken, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_tensor_with_rows_missing_is_no_store(tmp_path: Path) -> None:
    entry = packed_entry("w", (3, 5), "float32")
    with (
        pytest.raises(ValueError, match="40 bytes written for 'w', which has 60"),
        StoreWriter(tmp_path / "x.store", [entry], name="x", config={}, source={}) as writer,
    ):
        writer.write("w", [pack_rows(entry, torch.zeros(2, 5))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    source = source_of(TINY, tmp_path)
    name = build_store(source, tmp_path / "cache").name
    (tmp_path / "cache" / name).unlink()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive = (tmp_path / "cache" / f".{name}.{pid}.partial" for pid in (gone.pid, os.getppid()))
    dead.touch()
    alive.touch()
    build_store(source, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {name, alive.name}


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(TINY, tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=4096))
    with pytest.raises(
        RunError, match=r"needs \d+ bytes, 40960 are free; free some space or set TIGHTFIT_CACHE"
    ) as caught:
        build_store(source, tmp_path / "cache")
    assert caught.value.exit_code == 4
    assert list((tmp_path / "cache").iterdir()) == []


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from typing import Any
from tightfit.runtime.common.errors import TightfitError
from tightfit.profiles.weights.store_file import build_store
from tightfit.profiles.sources.random_weights import random_source
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    build_store(random_source(json.loads(sys.argv[1]), Path("tiny.json")), sys.argv[2])
except TightfitError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_is_a_run_error_and_the_partial_file_is_gone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, json.dumps(TINY), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert f"{os.strerror(errno.EFBIG)} while writing the weight store of" in done.stdout
    assert list((tmp_path / "cache").iterdir()) == []


# Sizes from a config alone


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize(("embedding", "form"), [("4bit", "q4"), ("8bit", "q8"), ("16bit", "bfloat16")])
def test_described_sizes_are_the_store_s(family: str, embedding: Any, form: str, tmp_path: Path) -> None:
    config = CONFIGS[family]
    described = describe(config, precision=Precision(embeddings=embedding))
    source = random_source(config, tmp_path / "config.json", precision=Precision(embeddings=embedding))
    with WeightStore.open(build_store(source, tmp_path)) as store:
        assert list(store.entries) == list(described)
        for name, entry in store.entries.items():
            assert (described[name].shape, described[name].format, described[name].row_bytes) == (
                entry.shape,
                entry.format,
                entry.row_bytes,
            )
            assert packed_bytes(described, name) == store.packed_bytes(name)
        for part in (
            "model.embed_tokens.weight[0:128]",
            "model.embed_tokens.weight[128:256]",
            "model.embed_tokens.weight[17:18]",
        ):
            assert packed_bytes(described, part) == store.packed_bytes(part)
        assert store.entries["model.embed_tokens.weight"].format == form


@pytest.mark.parametrize("config", (CONFIGS | VARIANTS).values(), ids=CONFIGS | VARIANTS)
def test_described_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: entry.shape for name, entry in describe(config).items()} == expected


def test_a_mistral_has_transformers_sliding_window_where_its_config_names_none() -> None:
    from tightfit.profiles.models.decoder_config import decoder_shape

    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in VARIANTS["mistral"].items() if key != "sliding_window"}
    assert set(decoder_shape(config).windows) == {transformers.AutoConfig.for_model(**config).sliding_window}
    assert set(decoder_shape(config | {"sliding_window": None}).windows) == {None}


def test_random_weights_have_the_config_s_spread_and_do_not_depend_on_order(tmp_path: Path) -> None:
    config = TINY | {"initializer_range": 0.05}
    source = random_source(config, tmp_path / "config.json", precision=Precision(embeddings="8bit"), seed=3)
    with WeightStore.open(build_store(source, tmp_path)) as store:
        for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
            weight = loaded(store, name)
            assert abs(weight.std().item() / 0.05 - 1) < 0.03
            assert abs(weight.mean().item()) < 0.002
        assert abs(loaded(store, "model.norm.weight").mean().item() - 1) < 0.03
        first = loaded(store, "model.layers.1.self_attn.q_proj.weight")
        assert not torch.equal(first, loaded(store, "model.layers.0.self_attn.q_proj.weight"))
    tensor = next(
        tensor for tensor in source.tensors() if tensor.entry.name == "model.layers.1.self_attn.q_proj.weight"
    )
    alone = torch.empty(tensor.entry.shape)
    unpack(tensor.entry, tensor.rows(0, tensor.entry.rows).view(-1), alone)
    assert torch.equal(first, alone)


def test_every_config_tensor_is_named_once() -> None:
    from tightfit.profiles.models.decoder_config import decoder_shape

    names = [name for name, _ in decoder_tensors(decoder_shape(CONFIGS["gemma3_text"]))]
    assert len(names) == len(set(names))


# What the lean process pays

LEAN = """
import sys
sys.modules["numpy"] = None
import torch, tightfit.runtime.engine.weights.store, tightfit.runtime.engine.training.records
heavy = {"gguf", "safetensors", "tokenizers", "pydantic", "jinja2", "transformers", "tightfit.profiles.weights.describe", "tightfit.profiles.weights.store_file"} & set(sys.modules)
assert not heavy, heavy
store = tightfit.runtime.engine.weights.store.WeightStore.open(sys.argv[1])
staging = torch.empty(store.packed_bytes("big.weight"), dtype=torch.uint8)
out = torch.empty(store.entries["big.weight"].shape, dtype=torch.bfloat16).zero_()
rows, gathered = torch.arange(64), torch.empty(64, out.shape[1], dtype=torch.bfloat16)
torch.set_num_threads(2)

def work():
    store.read_into("big.weight", staging)
    store.unpack("big.weight", staging, out)
    store.gather_rows("big.weight", rows, gathered)

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

small = staging[:1 << 17], out.view(-1)[:8192]
store.gather_rows("small.weight", rows[:8], torch.empty(8, 1024, dtype=torch.bfloat16))
store.read_into("small.weight", small[0])
store.unpack("small.weight", small[0], small[1])
store.read_into("big.weight", staging)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
for _ in range(5):
    work()
print((peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_unpacking_in_the_lean_process_takes_no_more_than_its_stated_workspace(tmp_path: Path) -> None:
    file = tmp_path / "big.store"
    for kind in ("q4", "q8", "q3_k", "nf4", "float16"):
        group = BLOCKS[kind][0] if kind in BLOCKS else 0 if kind == "float16" else 32
        entries = [
            Entry(name=f"{name}.weight", shape=(rows, 1024), format=kind, group=group)
            for name, rows in (("big", 4096), ("small", 8))
        ]
        with StoreWriter(file, entries, name="big", config={}, source={}) as writer:
            for entry in entries:
                if group:
                    packed = native_judge.random_groups(kind, group, entry.rows * entry.columns // group)
                else:
                    packed = pack_rows(entry, torch.randn(entry.shape))
                writer.write(entry.name, [packed])
        done = subprocess.run(
            [sys.executable, "-c", LEAN, str(file)], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        assert WORKSPACE_BYTES < 1 << 20
        assert int(done.stdout) <= WORKSPACE_BYTES + (
            1 << 20
        )  # code pages that are touched for the first time are not workspace


def test_reads_do_not_grow_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "cold.store"
    entry = packed_entry("w", (4096, 1024), "q8")
    with StoreWriter(file, [entry], name="cold", config={}, source={}) as writer:
        writer.write("w", [pack_rows(entry, torch.randn(entry.shape))])
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    size = os.fstat(descriptor).st_size

    def cached_pages() -> int:
        view = mmap.mmap(descriptor, size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
        pages = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        handle = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(handle)), ctypes.c_size_t(size), vector
        )
        del handle
        view.close()
        assert failed == 0
        return sum(page & 1 for page in vector)

    if cached_pages() > 16:
        pytest.skip("this file system keeps pages whatever it is advised")
    with WeightStore.open(file) as store:
        for staging in (
            aligned_buffer(store.packed_bytes("w")),
            torch.empty(store.packed_bytes("w") + 8, dtype=torch.uint8)[8:],
        ):
            store.read_into("w", staging)
            assert cached_pages() <= 48
        store.gather_rows("w", torch.arange(0, 4096, 16), torch.empty(256, 1024))
        assert cached_pages() <= 48
    os.close(descriptor)
