"""A decoder with a cache: what both forms of it share, the written one and the traced one.

Activations are float32. Tokens go through each layer in passes; within a pass each operator runs on groups of `GROUP`
tokens from the first new one on, whatever the number of a pass's tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.generation.cache import LayerCache
from tightfit.runtime.engine.generation.job import GenerationJob
from tightfit.runtime.engine.generation.names import MAGNITUDE
from tightfit.runtime.engine.generation.products import Products
from tightfit.runtime.engine.generation.stream import StreamedPieces
from tightfit.runtime.engine.weights.store import WeightStore


class CachedDecoder(ABC):
    """`run` takes new tokens through the model and returns the logits after the last one."""

    def __init__(self, job: GenerationJob, device: Device, store: WeightStore, stream: StreamedPieces) -> None:
        self.job, self.device, self.store, self.stream = job, device, store, stream
        self._tensors: dict[str, Tensor] = {}
        self.products = Products(job, device, store, stream)
        self.operators = device.kernels.fused
        self.caches = [
            LayerCache(self._place(f"keys.{layer}"), self._place(f"values.{layer}"), seen.window)
            for layer, seen in enumerate(job.seen)
        ]

    def take_from(self, stream: StreamedPieces) -> None:
        """Take the streamed pieces from another source from the next pass on."""
        self.stream = self.products.stream = stream

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
        alone = len(ids) == 1
        for rows in passes:
            self.stream.begin(with_head=False)
            self._layers(ids[rows], between, alone=alone)
        self.stream.begin(with_head=True)
        hidden, logits = self._layers(ids[last], between, alone=alone), self._place("logits")
        bias = None if self.job.bias is None else self._place(self.job.bias)
        self.products.multiply(self.job.head, self._last(hidden), [slice(0, 1)], bias, out=logits)
        if self.job.cap is not None:
            logits.div_(self.job.cap).tanh_().mul_(self.job.cap)
        between()
        return logits[0]

    @abstractmethod
    def _layers(self, ids: Sequence[int], between: Callable[[], None], *, alone: bool) -> Tensor:
        """Hidden states float32 [t, H] of the new tokens of a pass, after the last layer; `alone`: one token is all that is new."""

    @abstractmethod
    def _last(self, hidden: Tensor) -> Tensor:
        """What is multiplied with the head, float32 [1, H], of a pass's hidden states."""

    def _embed(self, table: str, ids: Sequence[int], scale: float, out: Tensor) -> None:
        """Rows of a table, times `scale`: rows of the head, if both are one and it is in memory, else read from disk."""
        if all(self.products.row(table, token, out[place]) for place, token in enumerate(ids)):
            if scale != 1.0:
                out.mul_(scale)
            return
        wanted = torch.tensor(ids, dtype=torch.int64)
        self.operators["tightfit.embed_rows"](table, wanted, scale, out=(out,), store=self.store)

    def _attend(
        self, number: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float, out: Tensor
    ) -> None:
        """Put keys and values of a group of tokens into a layer's cache, and let their queries attend to it."""
        cache, scratch = self.caches[number], self._place("attention")
        places = cache.add(k.shape[0])
        self.operators["tightfit.cache_tokens"](k, v, cos, sin, out=(*places, scratch))
        self.operators["tightfit.cached_attention"](
            q, *cache.filled, cos, sin, cache.window, cache.begin, scale, out=(out, scratch)
        )

    def _place(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self.device.tensor(*self.job.places[name])
        return self._tensors[name]
