"""Gradients of what several tiles attend to: summed in float32 by their own backwards, in one storage."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from interpreter import run_step
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tightfit.profiles.measuring import whole_step
from tightfit.profiles.tracing.tile_ops import tile_attention, tile_attention_backward
from tightfit.profiles.tracing.tile_sums import fuse_sums
from tightfit.profiles.tracing.trace import trace

TILE, HEADS, KV_HEADS, WIDTH = 16, 4, 2, 8
SIZES = HEADS, KV_HEADS, 0.3, 0
add = torch.ops.aten.add.Tensor


def tensors(tiles, dtype):
    torch.manual_seed(tiles)
    return [
        [torch.randn(TILE, count * WIDTH).to(dtype) for _ in range(tiles)]
        for count in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def attended(queries, keys, values):
    return [tile_attention(q, keys[: t + 1], values[: t + 1], None, *SIZES)[0] for t, q in enumerate(queries)]


def gradients(queries, keys, values, upstream, beside=None):
    """Of all keys, then of all values, as autograd makes them; `beside` makes further results of them."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*keys, *values)]
    own = leaves[: len(keys)], leaves[len(keys) :]
    results, given = attended(queries, *own), list(upstream)
    for result in beside(*own) if beside else []:
        results.append(result)
        given.append(torch.ones_like(result))
    return list(torch.autograd.grad(results, leaves, given))


def fused(arguments, beside=None):
    """The graph of `gradients` after `fuse_sums`."""
    traced = make_fx(lambda *parts: gradients(*parts, beside=beside))(*arguments)
    fuse_sums(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced


def backwards(graph):
    return list(graph.find_nodes(op="call_function", target=tile_attention_backward))


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_what_tiles_contribute_is_added_in_float32_and_rounded_once(tiles):
    arguments = tensors(tiles, torch.bfloat16)
    traced = fused(arguments)
    assert not traced.graph.find_nodes(op="call_function", target=add)
    assert [node.args[7] is not None for node in backwards(traced.graph)] == [False] + [True] * (tiles - 1)
    queries, keys, values, upstream = arguments
    sums, due = (None, None), ([], [])
    with torch.no_grad():
        for t in reversed(range(tiles)):
            y, lse, _ = tile_attention(queries[t], keys[: t + 1], values[: t + 1], None, *SIZES)
            own = queries[t], keys[: t + 1], values[: t + 1], y, lse, None
            _, *new, _ = tile_attention_backward(upstream[t], *own, *sums, *SIZES)
            due[0].insert(0, new[t])
            due[1].insert(0, new[-1])
            sums = new[:t], new[t + 1 : -1]
        found = traced(*arguments)
    assert all(torch.equal(made, wanted.bfloat16()) for made, wanted in zip(found, [*due[0], *due[1]], strict=True))


def test_float32_gradients_are_those_of_autograd():
    arguments = tensors(4, torch.float32)
    for made, wanted in zip(fused(arguments)(*arguments), gradients(*arguments), strict=True):
        torch.testing.assert_close(made, wanted)


def only_keys(keys, values):
    return [keys[1].sin()]


def all_of_them(keys, values):
    return [tensor.sin() for tensor in (*keys, *values)]


@pytest.mark.parametrize("beside", [only_keys, all_of_them])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_else_contributes_is_added_as_before(beside, dtype):
    arguments = tensors(3, dtype)
    for made, wanted in zip(fused(arguments, beside)(*arguments), gradients(*arguments, beside=beside), strict=True):
        torch.testing.assert_close(made, wanted, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)


class Tiled(nn.Module):
    """Attention in tiles of a row, whose keys and values are products, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, n * WIDTH, bias=False) for n in (HEADS, KV_HEADS, KV_HEADS))

    def forward(self, x):
        queries, keys, values = ([layer(part) for part in x.split(TILE)] for layer in self.maps)
        return torch.cat(attended(queries, keys, values)).square().sum()


@pytest.mark.slow
def test_sums_of_a_layer_lie_in_one_storage_each():
    torch.manual_seed(3)
    module, x = Tiled(), torch.randn(4 * TILE, 8)
    traced = trace(module, {"x": x})
    programs = {program.name: program for program in traced.programs}
    (program,) = (p for p in traced.programs if any("tile" in operator.target for operator in p.operators))
    back = [operator for operator in program.operators if operator.target == "tightfit.tile_attention_backward"]
    assert [len(operator.outputs) - 2 for operator in back] == [8, 6, 4, 2]
    for behind, ahead in pairwise(back):
        count = len(ahead.args[2])
        old = [argument["operand"]["value"] for argument in (*ahead.args[7], *ahead.args[8])]
        assert ahead.outputs[1:-1] == old == [*behind.outputs[1 : 1 + count], *behind.outputs[2 + count : -2]]
    parameters = dict(module.named_parameters())
    due = torch.autograd.grad(module(x), list(parameters.values()))
    given = {"x": x} | {name: parameter.detach() for name, parameter in parameters.items()}
    env = run_step(traced.layers, programs, given)
    described = {name: program.model_dump() for name, program in programs.items()}
    layers, names = [layer.model_dump() for layer in traced.layers], [f"grad:{name}" for name in parameters]
    in_place = whole_step.run_step(layers, described, given, names)
    for name, wanted in zip(names, due, strict=True):
        torch.testing.assert_close(env[name], wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(in_place[name], env[name])
