"""The forward of a hand-written decoder on new tokens: what `tightfit.profiles.models.decoder` computes, with a cache and without a
loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.cpu.products import blocks
from tightfit.runtime.engine.cpu.rotary import rotary_frequencies
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.generation.cached_decoder import CachedDecoder
from tightfit.runtime.engine.generation.job import GenerationJob
from tightfit.runtime.engine.generation.names import EMBEDDING
from tightfit.runtime.engine.generation.stream import StreamedPieces
from tightfit.runtime.engine.weights.store import WeightStore


class WrittenDecoder(CachedDecoder):
    """A decoder of which the job says the shape."""

    def __init__(self, job: GenerationJob, device: Device, store: WeightStore, stream: StreamedPieces) -> None:
        super().__init__(job, device, store, stream)
        assert job.shape is not None
        self.shape = job.shape
        keys = list(zip(self.shape["thetas"], self.shape["scaled"], strict=True))
        different = sorted(set(keys))
        self.frequencies = [
            rotary_frequencies(self.shape["head_dim"], theta, dict(self.shape["rope_scaling"]) if scaled else {})
            for theta, scaled in different
        ]
        self.rotations = [different.index(key) for key in keys]
        """of each layer, which of the frequencies are its own"""

    def _layers(self, ids: Sequence[int], between: Callable[[], None], *, alone: bool) -> Tensor:
        count = len(ids)
        groups = list(blocks(count, GROUP))
        hidden, normed, rstd = (self._place(name)[:count] for name in ("hidden", "normed", "rstd"))
        for rows in groups:
            self._embed(EMBEDDING, ids[rows], self._scale, hidden[rows])
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

    def _last(self, hidden: Tensor) -> Tensor:
        normed, rstd = self._place("normed")[:1], self._place("rstd")[:1]
        self._norm("model.norm.weight", hidden[-1:], normed, rstd)
        return normed

    def _angles(self, key: int, count: int) -> tuple[Tensor, Tensor]:
        """cos, sin float32 [count, D / 2] of the new tokens' positions."""
        return self._place(f"cos.{key}")[:count], self._place(f"sin.{key}")[:count]

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
        for rows in groups:
            own = q[rows], k[rows], v[rows], cos[rows], sin[rows]
            self._attend(number, *own, shape["attention_scale"], attended[rows])
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
