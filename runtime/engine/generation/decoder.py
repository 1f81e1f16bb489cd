"""The forward of a decoder on new tokens: what `tightfit.profiles.models.decoder` computes, with a cache and without a loss.

Activations are float32. Tokens go through each layer in passes; within a pass each operator runs on groups of `GROUP`
tokens from the first new one on, whatever the number of a pass's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.cpu.products import blocks
from tightfit.runtime.engine.cpu.rotary import rotary_frequencies
from tightfit.runtime.engine.device.channels import Channel
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.generation.cache import LayerCache
from tightfit.runtime.engine.generation.job import STREAMED, GenerationJob
from tightfit.runtime.engine.generation.names import EMBEDDING, HEAD, MAGNITUDE
from tightfit.runtime.engine.generation.products import Products
from tightfit.runtime.engine.generation.stream import Stream
from tightfit.runtime.engine.training.adapter import adapter_key
from tightfit.runtime.engine.weights.safetensors_file import Reader
from tightfit.runtime.engine.weights.store import Store

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class CachedDecoder:
    """`run` takes new tokens through the model and returns the logits after the last one."""

    def __init__(self, job: GenerationJob, device: Device, store: Store, stream: Stream) -> None:
        self.job, self.shape, self.device, self.store, self.stream = job, job.shape, device, store, stream
        self._tensors: dict[str, Tensor] = {}
        self.products = Products(job, device, store, stream)
        self.head = next(name for name in HEAD if name in self.products.parts)
        self.operators = device.kernels.fused
        keys = list(zip(self.shape["thetas"], self.shape["scaled"], strict=True))
        different = sorted(set(keys))
        self.frequencies = [
            rotary_frequencies(self.shape["head_dim"], theta, dict(self.shape["rope_scaling"]) if scaled else {})
            for theta, scaled in different
        ]
        self.rotations = [different.index(key) for key in keys]
        """of each layer, which of the frequencies are its own"""
        self.caches = [
            LayerCache(self._place(f"keys.{layer}"), self._place(f"values.{layer}"), window)
            for layer, window in enumerate(self.shape["windows"])
        ]

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.caches[0].filled[0].dtype

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.caches[0].begin + self.caches[0].used

    def load(self, read: Callable[[str, Tensor], None]) -> None:
        """Load all that stays in memory; `read(name, out)` reads a tensor of the adapter."""
        magnitudes: dict[str, Tensor] = {}
        for name in self.job.places:
            if name in self.store.entries:
                self.store.load(name, self._place(name))
            elif ".lora_" in name:
                read(name, self._place(name))
                if name.endswith(MAGNITUDE):
                    magnitudes[name.removesuffix(MAGNITUDE) + ".weight"] = self._place(name)
        self.products.load()
        if magnitudes:
            self.products.find_lengths(magnitudes)

    def return_to(self, position: int) -> int:
        """Forget the tokens from `position` on, or all if some before it are not in every cache any more; returns how many
        are left.
        """
        kept = position if all(cache.can_return_to(position) for cache in self.caches) else 0
        for cache in self.caches:
            cache.return_to(kept)
        return kept

    def run(self, ids: Sequence[int], between: Callable[[], None]) -> Tensor:
        """The logits, float32 [V], after the last of the new tokens `ids`, at least one, which stay in the cache.

        They are overwritten by the next call. `between` is called after every layer.
        """
        *passes, last = blocks(len(ids), self.job.pass_tokens)
        for rows in passes:
            self.stream.begin(with_head=False)
            self._layers(ids[rows], between)
        self.stream.begin(with_head=True)
        hidden, logits = self._layers(ids[last], between), self._place("logits")
        normed, rstd = self._place("normed")[:1], self._place("rstd")[:1]
        self._norm("model.norm.weight", hidden[-1:], normed, rstd)
        self.products.multiply(self.head, normed, [slice(0, 1)], None, out=logits)
        between()
        return logits[0]

    def _layers(self, ids: Sequence[int], between: Callable[[], None]) -> Tensor:
        count = len(ids)
        groups = list(blocks(count, GROUP))
        hidden, normed, rstd = (self._place(name)[:count] for name in ("hidden", "normed", "rstd"))
        for rows in groups:
            self._embed(ids[rows], hidden[rows])
        positions = self._place("positions")[:count]
        torch.arange(self.length, self.length + count, out=positions.view(-1))
        for key, frequencies in enumerate(self.frequencies):
            cos, sin = self._angles(key, count)
            torch.mul(positions, frequencies, out=cos)
            torch.sin(cos, out=sin)
            cos.cos_()
        for number, key in enumerate(self.rotations):
            self._layer(number, hidden, normed, rstd, groups, *self._angles(key, count))
            between()
        return hidden

    def _angles(self, key: int, count: int) -> tuple[Tensor, Tensor]:
        """cos, sin float32 [count, D / 2] of the new tokens' positions."""
        return self._place(f"cos.{key}")[:count], self._place(f"sin.{key}")[:count]

    def _embed(self, ids: Sequence[int], out: Tensor) -> None:
        """Embeddings of tokens: rows of the head, if both are one and it is in memory, else read from disk."""
        scale = self._scale
        if all(self.products.row(EMBEDDING, token, out[place]) for place, token in enumerate(ids)):
            if scale != 1.0:
                out.mul_(scale)
            return
        wanted = torch.tensor(ids, dtype=torch.int64)
        self.operators["tightfit.embed_rows"](EMBEDDING, wanted, scale, out=(out,), store=self.store)

    def _layer(
        self, number: int, hidden: Tensor, normed: Tensor, rstd: Tensor, groups: list[slice], cos: Tensor, sin: Tensor
    ) -> None:
        shape, count, prefix = self.shape, hidden.shape[0], f"model.layers.{number}."
        q, k, v, attended, made, gate, up = (
            self._place(name)[:count] for name in ("q", "k", "v", "attended", "made", "gate", "up")
        )

        def project(name: str, x: Tensor, out: Tensor) -> None:
            bias = f"{prefix}{name}.bias"
            held = self._place(bias) if bias in self.job.places else None
            self.products.multiply(f"{prefix}{name}.weight", x, groups, held, out=out)

        def norm(name: str, x: Tensor, out: Tensor) -> None:
            for rows in groups:
                self._norm(f"{prefix}{name}.weight", x[rows], out[rows], rstd[rows])

        norm("input_layernorm", hidden, normed)
        for name, out in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            project(f"self_attn.{name}", normed, out)
        if shape["head_norm"]:
            self._norm_heads(f"{prefix}self_attn.q_norm.weight", q, groups)
            self._norm_heads(f"{prefix}self_attn.k_norm.weight", k, groups)
        self._attend(number, q, k, v, attended, groups, cos, sin)
        project("self_attn.o_proj", attended, made)
        if shape["post_norms"]:
            norm("post_attention_layernorm", made, made)
        hidden.add_(made)
        norm("pre_feedforward_layernorm" if shape["post_norms"] else "post_attention_layernorm", hidden, normed)
        project("mlp.gate_proj", normed, gate)
        project("mlp.up_proj", normed, up)
        for rows in groups:
            self.operators["tightfit.gated"](gate[rows], up[rows], shape["activation"], out=(gate[rows],))
        project("mlp.down_proj", gate, made)
        if shape["post_norms"]:
            norm("post_feedforward_layernorm", made, made)
        hidden.add_(made)

    def _attend(
        self, number: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, groups: list[slice], cos: Tensor, sin: Tensor
    ) -> None:
        cache, scratch = self.caches[number], self._place("attention")
        for rows in groups:
            places = cache.add(rows.stop - rows.start)
            self.operators["tightfit.cache_tokens"](k[rows], v[rows], cos[rows], sin[rows], out=(*places, scratch))
            self.operators["tightfit.cached_attention"](
                q[rows],
                *cache.filled,
                cos[rows],
                sin[rows],
                cache.window,
                cache.begin,
                self.shape["attention_scale"],
                out=(out[rows], scratch),
            )

    def _norm(self, name: str, x: Tensor, out: Tensor, rstd: Tensor) -> None:
        self.operators["tightfit.rms_norm"](
            x, self._place(name), self.shape["eps"], self.shape["unit_offset"], out=(out, rstd)
        )

    def _norm_heads(self, name: str, x: Tensor, groups: list[slice]) -> None:
        sums = self._place("head_rstd")
        width = self.shape["head_dim"]
        for rows in groups:
            heads = x[rows].view(-1, width)
            self._norm(name, heads, heads, sums[: heads.shape[0]])

    @property
    def _scale(self) -> float:
        """What embeddings are multiplied by, in float32."""
        return float(torch.tensor(self.shape["embed_scale"], dtype=torch.float32))

    def _place(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self.device.tensor(*self.job.places[name])
        return self._tensors[name]


def open_decoder(job: GenerationJob, device: Device, store: Store, channel: Channel) -> CachedDecoder:
    """The decoder of a job, with all that stays in memory loaded. Raises InputError for a damaged store or adapter."""
    streamed = [piece for piece in job.pieces if piece.state == STREAMED]
    body = [piece for piece in streamed if piece.matrix not in HEAD]
    head = [piece for piece in streamed if piece.matrix in HEAD]
    decoder = CachedDecoder(job, device, store, Stream(channel, device, store, job.staging, body, head))
    reader = Reader(job.adapter, "copy the adapter again") if job.adapter else None
    try:
        decoder.load(lambda name, out: _read(reader, adapter_key(name, job.adapter_body), out))
    finally:
        if reader is not None:
            reader.close()
    return decoder


def _read(reader: Reader | None, key: str, out: Tensor) -> None:
    """Read a tensor of an adapter in float32. Raises InputError where it is of another shape, or no finite numbers."""
    assert reader is not None
    kind, shape = reader.described(key)
    if kind not in FLOATS or shape != tuple(out.shape):
        raise InputError(
            f"{reader.path}: {key} is {kind} {list(shape)} and the model wants floats of {list(out.shape)}; give an adapter of"
            " this model"
        )
    flat, done = out.view(-1), 0
    for chunk in reader.chunks(key):
        values = torch.frombuffer(bytearray(chunk), dtype=FLOATS[kind])
        flat[done : done + values.numel()].copy_(values)
        done += values.numel()
    if not torch.isfinite(flat).all():
        raise InputError(
            f"{reader.path}: {key} holds values that are no finite numbers; give the adapter of another run"
        )
