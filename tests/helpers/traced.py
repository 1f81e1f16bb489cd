"""Traces small decoders and runs their programs with the plain interpreter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from interpreter import run_step
from torch._subclasses import FakeTensorMode

from tightfit.profiles.measuring import whole_step
from tightfit.profiles.models.decoder import Decoder
from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, INFERENCE
from tightfit.profiles.tracing.trace import trace
from tightfit.profiles.tracing.traced import Trace

RANK, ALPHA = 4, 8.0


def trace_decoder(
    config: dict[str, Any],
    dtype: torch.dtype,
    batch: int,
    seq: int,
    lora: LoraConfig | None = None,
    tile: int | None = None,
    matrix_rows: int | None = None,
) -> Trace:
    """The step of a decoder written by hand; by default with pairs of RANK everywhere, with all tokens in one tile and
    matrices whole.
    """
    tiles = 1 if tile is None else batch * seq // tile
    return trace_step(fake_decoder(config, dtype, lora, tile, matrix_rows), batch, seq, tiles)


def fake_decoder(
    config: dict[str, Any],
    dtype: torch.dtype,
    lora: LoraConfig | None = None,
    tile: int | None = None,
    matrix_rows: int | None = None,
) -> Decoder:
    """A decoder written by hand whose parameters have no values."""
    lora = lora or LoraConfig(rank=RANK, alpha=ALPHA)
    with FakeTensorMode():
        return Decoder(decoder_shape(config), dtype=dtype, lora=lora, tile=tile, matrix_rows=matrix_rows)


def trace_step(module: torch.nn.Module, batch: int, seq: int, tiles: int = 1) -> Trace:
    """The step of a decoder without values on a batch of tokens."""
    with FakeTensorMode():
        names = ("input_ids", "labels") if module.rows_apart else ("input_ids", "labels", "positions")
        sample = {n: torch.zeros(batch, seq, dtype=torch.int64) for n in names}
    return trace(module, sample, decompositions=DECOMPOSITIONS, inference=INFERENCE, tiles=tiles)


def random_weights(
    config: dict[str, Any], dtype: torch.dtype, lora: LoraConfig | None = None
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = Decoder(decoder_shape(config), dtype=dtype, lora=lora or LoraConfig(rank=RANK, alpha=ALPHA))
    return {
        n: (torch.randn(p.shape) * (0.5 if p.dim() == 1 else 0.08)).to(dtype).to(p.dtype)
        for n, p in module.named_parameters()
    }


def random_batch(config: dict[str, Any], batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Right-padded samples of different lengths; the first third of each has no labels, like a prompt."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config["vocab_size"], (batch, seq), generator=generator)
    labels = torch.full((batch, seq), -100)
    for row in range(batch):
        length = seq - 5 * (row % 5)
        labels[row, length // 3 : length - 1] = tokens[row, length // 3 + 1 : length]
        tokens[row, length:] = 0
    return {"input_ids": tokens, "labels": labels, "positions": torch.arange(seq).repeat(batch, 1)}


def shared_batch(config: dict[str, Any], batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Rows of several samples of different lengths, each as in `random_batch`, with padding behind them."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, config["vocab_size"], (batch, seq), generator=generator)
    labels, positions = torch.full((batch, seq), -100), torch.arange(seq).repeat(batch, 1)
    for row in range(batch):
        begin = 0
        while (length := min(3 + (7 * row + 5 * begin) % 11, seq - 1 - begin)) > 1:
            end = begin + length
            labels[row, begin + length // 3 : end - 1] = tokens[row, begin + length // 3 + 1 : end]
            positions[row, begin:end] = torch.arange(length)
            begin = end
        positions[row, begin:] = torch.arange(seq - begin)
    return {"input_ids": tokens, "labels": labels, "positions": positions}


def samples_of(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels) of each sample of a batch, by its positions."""
    found = []
    for tokens, labels, positions in zip(batch["input_ids"], batch["labels"], batch["positions"]):
        ends = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        found += [(tokens[begin:end], labels[begin:end]) for begin, end in pairwise(ends)]
    return found


def interpret(
    traced: Trace,
    weights: dict[str, torch.Tensor],
    batch: dict[str, torch.Tensor],
    run: Callable[..., dict[str, torch.Tensor]] = run_step,
) -> dict[str, torch.Tensor]:
    tensors = dict(weights) | batch
    for tensor in traced.tensors:
        if tensor.kind == "weight" and "[" in tensor.name:
            base, rows = tensor.name.rstrip("]").split("[")
            start, stop = map(int, rows.split(":"))
            tensors[tensor.name] = weights[base][start:stop].clone()  # so that it begins where its storage does
    return run(traced.layers, {p.name: p for p in traced.programs}, tensors)


def loss_and_gradients(
    traced: Trace, weights: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], *, compiled: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients by the names of what is trained) by the plain interpreter, or with operators `compiled` as for a
    run.
    """
    trained = [tensor.name for tensor in traced.tensors if tensor.kind == "trainable"]
    wanted = [traced.loss, *(f"grad:{name}" for name in trained)]

    def run_compiled(layers: Any, programs: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        described = {name: program.model_dump() for name, program in programs.items()}
        return whole_step.run_step([layer.model_dump() for layer in layers], described, tensors, wanted)

    with torch.no_grad():
        made = interpret(traced, weights, batch, run_compiled if compiled else run_step)
    return float(made[traced.loss]), {name: made[f"grad:{name}"] for name in trained}
