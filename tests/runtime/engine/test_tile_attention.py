"""Attention of the tiles of a long row against PyTorch's own over the whole row, in double precision."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tightfit.runtime.common.processor import features
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.cpu.rotary import TURNED_ELEMENTS, rotary, rotary_backward
from tightfit.runtime.engine.cpu.tile_attention import (
    KEYS,
    LEAST_KEYS,
    LEAST_QUERIES,
    QUERIES,
    tile_attention,
    tile_attention_backward,
    tile_attention_scratch,
)

SHAPES = [  # tiles, tokens of each, heads of queries, of keys, columns
    (1, 1, 2, 1, 4),
    (1, 100, 6, 3, 16),
    (5, 7, 4, 4, 8),
    (5, 100, 4, 2, 16),
    (2, QUERIES + 37, 3, 1, 32),
    (3, KEYS + LEAST_KEYS + 1, 2, 2, 8),
]
TYPES = [(torch.float32, 3e-6), (torch.bfloat16, 5e-3)]


def visible(seq, positions, window):
    """bool [T, T]: which keys each query sees."""
    place = torch.arange(seq)
    first = torch.zeros_like(place) if positions is None else place - positions
    if window:
        first = torch.maximum(first, place - window + 1)
    return (place[None] <= place[:, None]) & (place[None] >= first[:, None])


def reference(q, k, v, seen, heads, kv_heads, scale):
    """y [T, H * D] and log-sum-exp [H, T] in double precision."""
    q, k, v = (x.view(len(x), n, -1).transpose(0, 1) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    y = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale)[0]
    sums = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf).logsumexp(-1)
    return y.transpose(0, 1).reshape(len(seen), -1), sums


def tiled(tensors, tile, positions, heads, kv_heads, scale, window, *, in_place=False):
    """y, lse, dq, dk and dv of a whole row, tile by tile: forward from the first to the last, then back."""
    q, k, v, dy = (x.split(tile) for x in tensors)
    places = [None] * len(q) if positions is None else positions.split(tile)
    sizes = tile, tile, heads, q[0].shape[1], k[0].shape[1]
    # What lies in scratch and outputs before is never read.
    scratch = [torch.full((tile_attention_scratch(*sizes, backward=b),), math.nan) for b in (False, True)]
    results = []
    for t, queries in enumerate(q):
        y, lse = torch.full_like(queries, math.nan), torch.full((heads, tile), math.nan)
        out = y, lse, scratch[0]
        tile_attention(queries, k[: t + 1], v[: t + 1], places[t], heads, kv_heads, scale, window, out=out)
        results.append((y, lse))
    gradients, sums = [], None
    finished_keys, finished_values = [], []
    for t in reversed(range(len(q))):
        before = (None, None) if sums is None else (sums[: t + 1], sums[t + 1 :])
        dq = torch.full_like(q[t], math.nan)
        if sums is None or not in_place:
            sums = [torch.full(x.shape, math.nan) for x in (*k[: t + 1], *v[: t + 1])]
        arguments = dy[t], q[t], k[: t + 1], v[: t + 1], *results[t], places[t], *before, heads, kv_heads, scale, window
        tile_attention_backward(*arguments, out=(dq, *sums, scratch[1]))
        gradients.insert(0, dq)
        finished_keys.insert(0, sums[t])
        finished_values.insert(0, sums[-1])
        sums = [*sums[:t], *sums[t + 1 : -1]]
    y, lse = torch.cat([y for y, _ in results]), torch.cat([lse for _, lse in results], 1)
    return [y, lse, *map(torch.cat, (gradients, finished_keys, finished_values))]


def compared(shape, dtype, tolerance, *, positions=None, window=0):
    """Compare attention by tiles and its gradients with PyTorch's over the row, and with the same once more, in
    place.
    """
    tiles, tile, heads, kv_heads, width = shape
    seq = tiles * tile
    torch.manual_seed(seq)
    scale = 0.7 / math.sqrt(width)
    tensors = [torch.randn(seq, n * width).to(dtype) for n in (heads, kv_heads, kv_heads, heads)]
    rest = positions, heads, kv_heads, scale, window
    found = tiled(tensors, tile, *rest)
    assert all(map(torch.equal, found, tiled(tensors, tile, *rest, in_place=True)))
    exact = [x.double().requires_grad_() for x in tensors[:3]]
    due, sums = reference(*exact, visible(seq, positions, window), heads, kv_heads, scale)
    gradients = torch.autograd.grad(due, exact, tensors[3].double())
    y, lse, *made = found
    rounded = dtype is torch.bfloat16 and not {"amx_bf16", "bf16", "svebf16"}.isdisjoint(features())
    assert near(lse * math.log(2), sums.detach(), 2e-3 if rounded else 3e-6)
    for tensor, wanted in zip([y, *made], [due.detach(), *gradients], strict=True):
        assert near(tensor, wanted, tolerance, 1e-6 * float(tensors[3].double().norm()))
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, torch.float32, torch.float32]
    return found


def near(found, wanted, tolerance, least=0.0):
    """Whether the distance is within a share of the length of what is due."""
    return float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm()) + least


def positions_of(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_attend_as_the_whole_row_does(shape, dtype, tolerance):
    compared(shape, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("window", [1, 30, 100, 137, 230, 10_000])
def test_a_window_inside_a_tile_and_over_several(window, dtype, tolerance):
    compared((5, 100, 4, 2, 16), dtype, tolerance, window=window)


def test_a_window_that_begins_amid_long_tiles():
    for window in (KEYS, LEAST_KEYS + 1):
        compared((3, KEYS + LEAST_KEYS + 1, 2, 1, 8), torch.float32, 3e-6, window=window)


SAMPLES = [  # lengths of the samples of 5 tiles of 100 tokens
    (500,),
    (130, 40, 330),
    (100, 100, 300),
    (1,) * 500,
    (199, 2, 250, 49),
]


@pytest.mark.parametrize("window", [0, 60])
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("lengths", SAMPLES)
def test_samples_that_share_the_row_do_not_see_each_other(lengths, dtype, tolerance, window):
    compared((5, 100, 4, 2, 16), dtype, tolerance, positions=positions_of(*lengths), window=window)


def test_a_row_of_one_sample_has_the_same_bits_with_positions_and_without():
    shape = 3, 150, 4, 2, 16
    alone = compared(shape, torch.float32, 3e-6)
    assert all(map(torch.equal, alone, compared(shape, torch.float32, 3e-6, positions=torch.arange(450))))
    assert all(map(torch.equal, alone, compared(shape, torch.float32, 3e-6, window=450)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_samples_tiles_and_window(data):
    tiles, tile = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 150))
    seq = tiles * tile
    begun = sorted(data.draw(st.sets(st.integers(1, max(1, seq - 1)), max_size=8)) | {0, seq})
    positions = positions_of(*(after - before for before, after in itertools.pairwise(begun)))[:seq]
    window = data.draw(st.integers(0, seq + 1))
    compared((tiles, tile, 2, 1, 8), torch.float32, 5e-6, positions=positions, window=window)


def test_tiles_may_have_different_lengths():
    torch.manual_seed(0)
    lengths, width = (70, 3, 200, 41), 8
    q, k, v = torch.randn(41, 2 * width), *(torch.randn(sum(lengths), width) for _ in range(2))
    out = torch.empty_like(q), torch.empty(2, 41), torch.empty(tile_attention_scratch(41, 200, 2, 16, 8))
    tile_attention(q, k.split(lengths), v.split(lengths), None, 2, 1, 0.3, 0, out=out)
    whole = torch.cat([torch.zeros(273, 16), q]).double()
    due, sums = reference(whole, k.double(), v.double(), visible(314, None, 0), 2, 1, 0.3)
    assert near(out[0], due[273:], 3e-6)
    assert near(out[1] * math.log(2), sums[:, 273:], 3e-6)


def test_pieces_that_nobody_sees_are_not_multiplied(monkeypatch):
    """Scores computed, counted by the products' sizes."""
    counts = []
    original = torch.bmm

    def counted(left, right, *, out):
        counts[-1] += left.shape[1] * right.shape[2]
        return original(left, right, out=out)

    monkeypatch.setattr(torch, "bmm", counted)
    tile, tiles = 256, 4
    x = torch.randn(tile, 8)
    out = torch.empty_like(x), torch.empty(1, tile), torch.empty(tile_attention_scratch(tile, tile, 1, 8, 8))
    row = torch.arange(tile)
    for positions, window in ((None, 0), (row + 3 * tile, 0), (row, 0), (None, 128), (torch.zeros_like(row), 0)):
        counts.append(0)
        tile_attention(x, [x] * tiles, [x] * tiles, positions, 1, 1, 1.0, window, out=out)
    diagonal = QUERIES * (LEAST_KEYS + 2 * LEAST_KEYS)
    assert counts == [3 * tile * tile + diagonal] * 2 + [
        diagonal,
        2 * QUERIES * 2 * LEAST_KEYS,
        QUERIES * 2 * LEAST_KEYS,
    ]


def test_scratch_grows_neither_with_tiles_nor_with_their_length():
    for backward in (False, True):
        rooms = {tile_attention_scratch(tile, tile, 14, 896, 128, backward=backward) for tile in (512, 2048, 1 << 17)}
        assert len(rooms) == 1


def test_few_queries_attend_together_where_more_would_make_too_many_scores(monkeypatch):
    rooms = []
    for scores in (QUERIES * 4 * 200, QUERIES * 4 * 200 - 1):
        monkeypatch.setattr("tightfit.runtime.engine.cpu.tile_attention.SCORES", scores)
        rooms.append(tile_attention_scratch(200, 200, 4, 32, 16))
        compared((3, 200, 4, 2, 8), torch.float32, 3e-6, positions=positions_of(350, 250))
    assert rooms[0] - rooms[1] == (QUERIES - LEAST_QUERIES) * (5 * 200 + 2 * 32)


def test_precision_of_other_products_is_left_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    q = torch.randn(8, 8).bfloat16()
    y, lse, scratch = torch.empty_like(q), torch.empty(2, 8), torch.empty(tile_attention_scratch(8, 8, 2, 8, 8))
    arguments = q, [q], [q], None, 2, 2, 1.0, 0
    tile_attention(*arguments, out=(y, lse, scratch))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        tile_attention(*arguments, out=(y, lse, scratch[:-1]))
    sums = [torch.zeros(8, 8)] * 2
    with pytest.raises(ValueError, match="argument"):
        tile_attention_backward(q, *arguments[:3], y, lse, None, sums, sums, *arguments[4:], out=(y, *sums, scratch))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def turned(x, cos, sin, heads):
    first, second = x.view(len(x), heads, -1).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).reshape(x.shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (37, 3, 8), (TURNED_ELEMENTS // 1024 + 5, 16, 64)])
def test_tokens_are_turned_by_their_rows_of_the_tables(tokens, heads, width, dtype, tolerance):
    torch.manual_seed(tokens)
    x, angles = torch.randn(tokens, heads * width).to(dtype), torch.rand(2 * tokens, width // 2) * 6
    whole = angles.cos(), angles.sin()
    cos, sin = (table[tokens - 1 : -1] for table in whole)
    y, back = torch.empty_like(x), torch.empty_like(x)
    rotary(x, cos, sin, None, heads, out=(y,))
    assert near(y, turned(x.double(), cos.double(), sin.double(), heads), tolerance)
    rotary_backward(y, cos, sin, None, heads, out=(back,))
    assert near(back, x.double(), 2 * tolerance)
    picked = torch.empty_like(x)
    rotary(x, *whole, torch.arange(tokens - 1, 2 * tokens - 1)[None], heads, out=(picked,))
    assert torch.equal(picked, y)
    own = x.clone()
    rotary(own, cos, sin, None, heads, out=(own,))
    assert torch.equal(own, y)


def test_a_float32_gradient_is_turned_back_and_rounded_once():
    dy, angles = torch.randn(9, 8), torch.rand(9, 2)
    wide, narrow = torch.empty(9, 8), torch.empty(9, 8, dtype=torch.bfloat16)
    rotary_backward(dy, angles.cos(), angles.sin(), None, 2, out=(wide,))
    rotary_backward(dy, angles.cos(), angles.sin(), None, 2, torch.bfloat16, out=(narrow,))
    assert torch.equal(wide.bfloat16(), narrow)


def test_the_runtime_knows_them():
    names = ("rotary", "rotary_backward", "tile_attention", "tile_attention_backward")
    assert {f"tightfit.{name}" for name in names} <= set(OPERATORS)
