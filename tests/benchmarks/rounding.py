"""What rounding costs: ``python tests/benchmarks/rounding.py`` (some minutes; ``--tokens`` says how much text).

SmolLM2-135M's 4-bit weights are unpacked, and the channels of its hidden states, MLPs and attention heads are put
into a random order, so that no rounding finds the copy's own groups again: these weights count as the 16-bit model.
Each row rounds every matrix in another way: the change of the weights (root mean square, relative to their own), and
the perplexity on English news, by transformers in float32.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import tables

from examples.reviews import MODEL_FILE, MODEL_PACKAGE, extract
from tightfit.profiles.sources.lookup import resolve, vocabulary
from tightfit.profiles.weights.store_file import build_store, pack_q4, pack_q8, q4_blocks
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.engine.weights.store import Entry, WeightStore, unpack

TEXT_PACKAGE, TEXT_FILE = "gensim==4.4.0", "gensim/test/test_data/lee_background.cor"
GROUP = 32
Weights = dict[str, Tensor]


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of text that are predicted.")] = 16384,
    seq: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    threads: Annotated[int | None, typer.Option(help="Compute threads; by default every core.")] = None,
    write_page: Annotated[bool, typer.Option("--write", help="Write docs/benchmarks/rounding.md.")] = False,
) -> None:
    """Round, and measure perplexity."""
    if threads is not None:
        torch.set_num_threads(threads)
    source = resolve(str(extract(MODEL_PACKAGE, MODEL_FILE, cache_directory() / "reviews")))
    weights = reordered(unpacked(build_store(source, cache_directory() / "stores")), source.config)
    samples = read_samples(source.path, tokens, seq)
    ways: dict[str, Callable[[str, Tensor], Tensor]] = {
        "16 bit": lambda _, weight: weight,
        "8 bit": lambda _, weight: through("q8", pack_q8, weight),
        "4 bit, the group's range": lambda _, weight: through("q4", to_range, weight),
        "4 bit, refitted from the range": lambda _, weight: through("q4", lambda x, g: pack_q4(x, g, (1.0,)), weight),
        "4 bit, searched (--base 4bit)": lambda _, weight: through("q4", pack_q4, weight),
        "the same, with --embeddings 8bit": lambda name, weight: (
            through("q8", pack_q8, weight) if "embed" in name else through("q4", pack_q4, weight)
        ),
    }
    report, found, first = tables.Report(width=110), [], 0.0
    model = built(source.config)
    for name, rounding in ways.items():
        began = time.perf_counter()
        rounded = {key: rounding(key, weight) if weight.dim() == 2 else weight for key, weight in weights.items()}
        seconds = time.perf_counter() - began
        lost = sum(float((rounded[key] - weights[key]).square().sum()) for key in weights)
        whole = sum(float(weight.square().sum()) for weight in weights.values() if weight.dim() == 2)
        perplexity = perplexity_of(model, rounded, samples)
        first = first or perplexity
        change = f"{100 * (perplexity / first - 1):+.2f} %"
        found.append((name, f"{100 * math.sqrt(lost / whole):.3f} %", f"{perplexity:.3f}", change, f"{seconds:.1f}"))
        print(*found[-1], sep="  ", flush=True)
    table = Table(title=f"SmolLM2-135M, {samples.numel()} tokens of news")
    for heading in ("matrices", "change of weights", "perplexity", "beside 16 bit", "seconds to round"):
        table.add_column(heading)
    for row in found:
        table.add_row(*row)
    report.table(table)
    if write_page:
        report.write("rounding", "What rounding costs", " ".join((__doc__ or "").split("\n\n")[1].split()))


def unpacked(store: Path) -> Weights:
    """Every tensor of a store, float32."""
    with WeightStore.open(store) as opened:
        weights = {name: torch.empty(entry.shape) for name, entry in opened.entries.items()}
        for name, out in weights.items():
            opened.load(name, out)
    return weights


def reordered(weights: Weights, config: dict[str, Any]) -> Weights:
    """The same model with its channels in another order, and its matrices in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randperm(config["hidden_size"], generator=draw)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    made = {}
    for name, weight in weights.items():
        made[name] = weight[hidden] if weight.dim() == 1 else weight
        if any(part in name for part in ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            made[name] = weight[:, hidden]
        elif "o_proj" in name or "down_proj" in name:
            made[name] = weight[hidden]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        inner = torch.randperm(config["intermediate_size"], generator=draw)
        for part in ("gate_proj", "up_proj"):
            made[f"{prefix}mlp.{part}.weight"] = made[f"{prefix}mlp.{part}.weight"][inner]
        made[f"{prefix}mlp.down_proj.weight"] = made[f"{prefix}mlp.down_proj.weight"][:, inner]
        values, outputs = f"{prefix}self_attn.v_proj.weight", f"{prefix}self_attn.o_proj.weight"
        width = len(made[values]) // kv_heads
        orders = [torch.randperm(width, generator=draw) for _ in range(kv_heads)]
        made[values] = made[values][torch.cat([order + width * head for head, order in enumerate(orders)])]
        columns = [orders[head * kv_heads // heads] + width * head for head in range(heads)]
        made[outputs] = made[outputs][:, torch.cat(columns)]
    return {name: weight.bfloat16().float() if weight.dim() == 2 else weight for name, weight in made.items()}


def through(kind: str, pack: Callable[[Tensor, int], Tensor], weight: Tensor) -> Tensor:
    """A matrix as it comes back from the store's format `kind`."""
    out = torch.empty_like(weight)
    for rows, target in zip(weight.split(2048), out.split(2048), strict=True):
        entry = Entry(name="w", shape=tuple(rows.shape), format=kind, group=GROUP)
        unpack(entry, pack(rows, GROUP).view(-1), target)
    return out


def to_range(values: Tensor, group: int) -> Tensor:
    """4 bit with the scale that spreads 16 values over the group's range, and no search: what Q4_1 means."""
    x = values.view(-1, group)
    low = x.amin(1, keepdim=True)
    scale = ((x.amax(1, keepdim=True) - low) / 15).half()
    minimum = low.half()
    codes = ((x - minimum.float()) / scale.float().clamp_min(1e-30)).round_().clamp_(0, 15)
    return q4_blocks(codes.to(torch.uint8), scale, minimum).view(len(values), -1)


def built(config: dict[str, Any]) -> Any:
    """transformers' model, without values."""
    import transformers

    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()


def read_samples(model: str, tokens: int, seq: int) -> Tensor:
    """Running text, int64 [samples, seq]."""
    path = extract(TEXT_PACKAGE, TEXT_FILE, cache_directory() / "texts")
    tokenizer = vocabulary(model).tokenizer  # type: ignore[union-attr]
    ids = tokenizer.encode(" ".join(path.read_text(encoding="utf-8").split())).ids[: tokens // seq * seq]
    return torch.tensor(ids).view(-1, seq)


@torch.inference_mode()
def perplexity_of(model: Any, weights: Weights, samples: Tensor) -> float:
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    losses = [model(input_ids=part, labels=part).loss for part in samples.split(4)]
    return math.exp(float(torch.stack(losses).mean()))


if __name__ == "__main__":
    typer.run(main)
