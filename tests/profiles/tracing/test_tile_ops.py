"""Operators for tiles of a long row as torch sees them: gradients through a loop over tiles, shapes of fake tensors,
programs.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from tightfit.profiles.tracing.tile_ops import rotary, rotary_backward, tile_attention, tile_attention_backward
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.processor import features

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3


def tables(tokens):
    angles = torch.arange(tokens)[:, None] / 10 ** torch.arange(WIDTH // 2)
    return angles.cos(), angles.sin()


def by_tiles(q, k, v, cos, sin, tile, positions=None, window=0):
    """Attention with rotation of a row [T, heads * D], in a loop over its tiles."""
    keys, results = [], []
    values = list(v.split(tile))
    for t, (queries, own) in enumerate(zip(q.split(tile), k.split(tile))):
        rows = slice(t * tile, (t + 1) * tile)
        places = None if positions is None else positions[rows]
        turning = (cos[rows], sin[rows], None) if places is None else (cos, sin, places)
        keys.append(rotary(own, *turning, KV_HEADS))
        turned = rotary(queries, *turning, HEADS)
        y, *_ = tile_attention(turned, list(keys), values[: t + 1], places, HEADS, KV_HEADS, SCALE, window)
        results.append(y)
    return torch.cat(results)


def whole(q, k, v, cos, sin, positions=None, window=0):
    """The same by PyTorch's operators over the whole row."""
    seq = len(q)
    place = torch.arange(seq)
    positions = place if positions is None else positions
    first = torch.maximum(place - positions, place - window + 1 if window else torch.zeros_like(place))
    seen = (place[None] <= place[:, None]) & (place[None] >= first[:, None])
    cos, sin = cos[positions], sin[positions]
    q, k, v = (x.view(seq, -1, WIDTH).transpose(0, 1) for x in (q, k, v))

    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (turned(k), v))
    y = scaled_dot_product_attention(turned(q)[None], k[None], v[None], attn_mask=seen, scale=SCALE)[0]
    return y.transpose(0, 1).reshape(seq, -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("lengths", [None, (33, 1, 66)])
def test_gradients_through_a_loop_over_tiles_are_those_of_the_row(lengths, window, dtype, tolerance):
    torch.manual_seed(0)
    seq, tile = 100, 20
    positions = None if lengths is None else torch.cat([torch.arange(length) for length in lengths])
    inputs = [torch.randn(seq, n * WIDTH).to(dtype).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS)]
    dy = torch.randn(seq, HEADS * WIDTH).to(dtype)
    found = by_tiles(*inputs, *tables(seq), tile, positions, window)
    gradients = torch.autograd.grad(found, inputs, dy)
    assert [x.dtype for x in (found, *gradients)] == [dtype] * 4
    exact = [x.detach().double().requires_grad_() for x in inputs]
    due = whole(*exact, *(x.double() for x in tables(seq)), positions, window)
    for made, wanted in zip((found, *gradients), (due, *torch.autograd.grad(due, exact, dy.double()))):
        assert float((made.double() - wanted).detach().norm()) <= tolerance * float(wanted.detach().norm())


def test_sums_of_later_tiles_are_added_in_float32():
    """By hand, with the sums that the plan hands on: nearer to the exact gradient than bfloat16 comes."""
    torch.manual_seed(1)
    seq, tile, tiles = 640, 32, 20
    q, k, v, dy = (torch.randn(seq, n * WIDTH).bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    still = torch.ones(seq, WIDTH // 2).double(), torch.zeros(seq, WIDTH // 2).double()
    wanted = torch.autograd.grad(whole(*exact, *still), exact, dy.double())[2]
    keys, values, sizes = k.split(tile), v.split(tile), (HEADS, KV_HEADS, SCALE, 0)
    sums, finished = (None, None), []
    with torch.no_grad():
        for t in reversed(range(tiles)):
            rows, count = slice(t * tile, (t + 1) * tile), t + 1
            y, lse, _ = tile_attention(q[rows], keys[:count], values[:count], None, *sizes)
            _, *new, _ = tile_attention_backward(
                dy[rows], q[rows], keys[:count], values[:count], y, lse, None, *sums, *sizes
            )
            finished.insert(0, new[-1])
            sums = new[:t], new[count:-1]
    rounded = not {"amx_bf16", "bf16", "svebf16"}.isdisjoint(features())
    distance = float((torch.cat(finished).double() - wanted).norm() / wanted.norm())
    assert distance < (2e-3 if rounded else 1e-5)


def test_fake_tensors_have_the_shapes_of_real_ones():
    sizes = HEADS, KV_HEADS, SCALE, 0

    def shapes():
        q, key = (torch.zeros(20, n * WIDTH, dtype=torch.bfloat16) for n in (HEADS, KV_HEADS))
        keys, cos = [key, key], torch.zeros(20, WIDTH // 2)
        y, lse, scratch = tile_attention(q, keys, keys, None, *sizes)
        back = tile_attention_backward(y, q, keys, keys, y, lse, None, None, None, *sizes)
        wide = key.float()
        turned = rotary(q, cos, cos, None, HEADS), rotary_backward(wide, cos, cos, None, KV_HEADS, torch.bfloat16)
        return [(x.shape, x.dtype) for x in (y, lse, scratch, *back, *turned)]

    with torch.no_grad():
        real = shapes()
        with FakeTensorMode():
            assert shapes() == real
    assert real[1] == ((HEADS, 20), torch.float32)
    assert real[4:8] == [((20, KV_HEADS * WIDTH), torch.float32)] * 4
    assert real[-1] == ((20, KV_HEADS * WIDTH), torch.bfloat16)


@pytest.mark.parametrize(("window", "scores"), [(0, 20 * 40 + 210), (1, 20), (30, 20 * 30)])
def test_flops_are_those_of_the_keys_that_are_seen(window, scores):
    q, key = (torch.randn(20, n * WIDTH, requires_grad=True) for n in (HEADS, KV_HEADS))
    with FlopCounterMode(display=False) as counter:
        y, *_ = tile_attention(q, [key] * 3, [key] * 3, None, HEADS, KV_HEADS, SCALE, window)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 2 * scores * HEADS * WIDTH
    assert counter.get_total_flops() - forward == 5 * 2 * scores * HEADS * WIDTH


def test_what_does_not_fit_together_is_refused():
    q, key, cos = torch.zeros(20, HEADS * WIDTH), torch.zeros(20, KV_HEADS * WIDTH), torch.zeros(20, WIDTH // 2)
    sizes = HEADS, KV_HEADS, SCALE, 0
    lse, wide = torch.zeros(HEADS, 20), [key, key]
    wrong = [
        (tile_attention, (q, [], [], None, *sizes), "0 tiles of keys"),
        (tile_attention, (q, [key, key], [key], None, *sizes), "2 tiles of keys and 1 of values"),
        (tile_attention, (q, [key[:, 1:]], [key[:, 1:]], None, *sizes), "both have 16 columns"),
        (tile_attention, (q, [key], [key[:5]], None, *sizes), "as many rows"),
        (tile_attention, (q, [key, key[:5]], [key, key[:5]], None, *sizes), "20 queries and 5 keys in the last tile"),
        (tile_attention, (q, [key], [key], None, HEADS, 3, SCALE, 0), "each divides the one before"),
        (tile_attention, (q, [key], [key], None, HEADS, KV_HEADS, SCALE, -1), "the window is -1"),
        (tile_attention, (q, [key], [key], torch.arange(19), *sizes), "positions are torch.int64 of 19"),
        (tile_attention, (q, [key], [key], torch.zeros(20), *sizes), "positions are torch.float32"),
        (
            tile_attention_backward,
            (q, q, wide, wide, q, lse, None, wide, None, *sizes),
            "sums of keys or of values alone",
        ),
        (tile_attention_backward, (q, q, wide, wide, q, lse, None, [key], wide, *sizes), "one for each tile"),
        (
            tile_attention_backward,
            (q, q, wide, wide, q, lse, None, [key, key.bfloat16()], wide, *sizes),
            "not float32",
        ),
        (rotary, (q, cos, cos, None, 3), "are not 3 heads of 8"),
        (rotary, (q, cos[:19], cos[:19], None, HEADS), "20 tokens and 19 rows"),
        (rotary, (q, cos[:19], cos[:19], torch.arange(19), HEADS), "one for each of 20 tokens"),
    ]
    for operator, arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            operator(*arguments)


def test_a_head_of_attention_is_exact_where_a_query_sees_one_key():
    value = torch.randn(6, KV_HEADS * WIDTH)
    q = torch.full((6, HEADS * WIDTH), math.pi)
    y, *_ = tile_attention(q, [value], [value], None, HEADS, KV_HEADS, SCALE, 1)
    assert torch.equal(y, value.view(6, KV_HEADS, 1, WIDTH).expand(-1, -1, HEADS // KV_HEADS, -1).reshape(6, -1))
