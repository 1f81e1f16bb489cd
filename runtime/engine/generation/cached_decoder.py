"""A decoder with a cache: the programs of its steps, traced once for a single token and once for a group, run operator
by operator.

Activations are float32. Tokens go through each layer in passes; within a pass each operator runs on groups of up to
`GROUP` tokens from the first new one on, whatever the number of a pass's tokens. Matrix products are made for all
groups together, a block of a matrix at a time; attention goes to the cache. The last group of a pass may have fewer
tokens than its program: operators then compute rows that nobody reads, and matrix products, attention and embeddings
leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.cpu.products import blocks
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.generation.cache import LayerCache
from tightfit.runtime.engine.generation.frame import CompiledProgram, Frame
from tightfit.runtime.engine.generation.job import GenerationJob
from tightfit.runtime.engine.generation.names import (
    ATTEND,
    GATHER,
    IDS,
    MAGNITUDE,
    POSITIONS,
    PROJECTION,
    VALUES,
)
from tightfit.runtime.engine.generation.products import Products
from tightfit.runtime.engine.generation.sizes import aligned
from tightfit.runtime.engine.generation.stream import StreamedPieces
from tightfit.runtime.engine.kernels.compiled import CompiledOperator
from tightfit.runtime.engine.weights.store import WeightStore

Call = tuple[Callable[..., object], tuple[Any, ...]]
"""a function, and what it is called with"""
OWN = (ATTEND, GATHER, PROJECTION)
"""operators that the decoder carries out itself"""
DIRECT = {
    "aten.add.Tensor": lambda one, other, *, out: torch.add(one, other, out=out[0]),
    "aten.mul.Tensor": lambda one, other, *, out: torch.mul(one, other, out=out[0]),
}
"""operators whose out variants are known to write their output alone; that PyTorch looks for them maps a MiB of its
code
"""
VIEWS = 256
"""tensors of a pass that are at hand for its next layer, at most: a quarter of a MiB of them"""


@dataclass(frozen=True)
class DecoderPass:
    """What a pass calls."""

    given: Mapping[str, Sequence[Tensor]]
    """where the inputs of every group lie, int64 [tokens], by name"""
    layers: Iterable[Iterable[Call]]
    """the calls of each layer, made when its turn comes"""
    hidden: Tensor
    """what comes out, float32 [t, H]"""

    def kept(self) -> DecoderPass:
        """The same with all calls made, to be used again and again."""
        return replace(self, layers=[list(calls) for calls in self.layers])


class CachedDecoder:
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
        self.steps = {step["tokens"]: step for step in job.steps}
        self._programs = {
            tokens: {name: self._compiled(program) for name, program in step["programs"].items()}
            for tokens, step in self.steps.items()
        }
        self._alone: DecoderPass | None = None
        """that of one token, which is always the same"""

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
            elif name in self.job.numbers:
                self._place(name).view(-1).copy_(torch.tensor(self.job.numbers[name]))
            elif ".lora_" in name:
                read(name, self._place(name))
                if name.endswith(MAGNITUDE):
                    magnitudes[name.removesuffix(MAGNITUDE) + ".weight"] = self._place(name)
        self.products.load()
        if magnitudes:
            self.products.find_lengths(magnitudes)
        self._meet_longest()

    def _meet_longest(self) -> None:
        """Let a group of tokens attend to a whole cache, and to half of it, and so on: matrix products keep the buffers
        in which they arrange their operands, and those of a cache that grows group by group would leave holes in the
        heap.
        """
        layers = zip(self.job.seen, (cache.places for cache in self.caches), strict=True)
        seen, (keys, values) = max(layers, key=lambda layer: (layer[1][0].shape[1], layer[0].heads * layer[0].width))
        tokens = min(GROUP, keys.shape[1])
        q, angles = torch.zeros(tokens, seen.heads * seen.width), torch.zeros(tokens, seen.width // 2)
        out, count = (torch.empty_like(q), self._place("attention")), keys.shape[1]
        while count >= tokens:
            given = q, keys[:, :count], values[:, :count], angles, angles, None, 0, 1.0
            self.operators["tightfit.cached_attention"](*given, out=out)
            count //= 2

    def return_to(self, position: int) -> int:
        """Forget the tokens from `position` on, or all if some before it are not in every cache any more; returns how
        many are left.
        """
        kept = position if all(layer.can_return_to(position) for layer in self.caches) else 0
        for layer in self.caches:
            layer.return_to(kept)
        return kept

    def run(self, ids: Sequence[int], between: Callable[[], None]) -> Tensor:
        """The logits, float32 [V], after the last of the new tokens `ids`, at least one, which stay in the cache.

        They are overwritten by the next call. `between` is called after every layer.
        """
        *passes, last = blocks(len(ids), self.job.pass_tokens)
        tokens = 1 if len(ids) == 1 else max(self.steps)
        for rows in passes:
            self.stream.begin(with_head=False)
            self._layers(tokens, ids[rows], between)
        self.stream.begin(with_head=True)
        hidden, logits = self._layers(tokens, ids[last], between), self._place("logits")
        bias = None if self.job.bias is None else self._place(self.job.bias)
        self.products.multiply(self.job.head, hidden, [slice(0, 1)], bias, logits)
        if self.job.cap is not None:
            logits.div_(self.job.cap).tanh_().mul_(self.job.cap)
        between()
        return logits[0]

    def _layers(self, tokens: int, ids: Sequence[int], between: Callable[[], None]) -> Tensor:
        """What is multiplied with the head, float32 [1, H], after a pass in the step of so many `tokens`."""
        groups = list(blocks(len(ids), tokens))
        if tokens > 1:
            this = self._pass(tokens, groups)
        else:
            this = self._alone = self._alone or self._pass(1, groups).kept()
        for name, numbers in ((IDS, ids), (POSITIONS, range(self.length, self.length + len(ids)))):
            for place, rows in zip(this.given.get(name, ()), groups):
                own = list(numbers[rows])  # what is missing of the last group repeats its last number
                place.copy_(torch.tensor(own + own[-1:] * (tokens - len(own)), dtype=torch.int64))
        for calls in this.layers:
            for function, arguments in calls:
                function(*arguments)
            between()
        return this.hidden[-1:]

    def _view(
        self, at: int, count: int, dtype: str, size: tuple[int, ...], stride: tuple[int, ...], offset: int
    ) -> Tensor:
        return self.device.window(dtype)(at, count).as_strided(size, stride, offset)

    def _pass(self, tokens: int, groups: Sequence[slice]) -> DecoderPass:
        view = lru_cache(VIEWS)(self._view)
        step, start = self.steps[tokens], self.job.places[VALUES][0]
        frames = [
            Frame(
                program=self._programs[tokens][name],
                passed=step["passed"],
                bindings=bindings,
                groups=groups,
                start=start,
                held=self._place,
                view=view,
            )
            for name, bindings in step["layers"]
        ]
        caches, last = iter(self.caches), frames[-1]
        return DecoderPass(
            given={
                name: [
                    self.device.tensor(start + at * len(groups) + group * aligned(8 * tokens), (tokens,), "int64")
                    for group in range(len(groups))
                ]
                for name, at in step["passed"].items()
                if name in (IDS, POSITIONS)
            },
            layers=(self._calls(frame, caches) for frame in frames),
            hidden=last.made_rows(next(name for name, bound in last.bindings.items() if bound == step["result"])),
        )

    def _calls(self, frame: Frame, caches: Iterator[LayerCache]) -> Iterator[Call]:
        for operator, compiled in frame.program.operators:
            target, arguments = operator["target"], operator["args"]
            if target == PROJECTION:
                x, weight, bias = arguments[:3]
                held = None if bias is None else self._place(frame.bindings[bias["operand"]["value"]])
                matrix, (made,) = frame.bindings[weight["operand"]["value"]], operator["outputs"]
                read, out = frame.rows(x["operand"]), frame.made_rows(made)
                yield self.products.multiply, (matrix, read, frame.groups, held, out)
                continue
            layer = next(caches) if target == ATTEND else None
            names = set() if compiled is None else {operand["value"] for _, _, operand in compiled.slots}
            for group in range(len(frame.groups)):
                if compiled is not None:
                    outputs = [None if name is None else frame.made(name, group) for name in operator["outputs"]]
                    yield compiled.run, ({name: frame.storage(name, group) for name in names}, outputs)
                    continue
                out = frame.made_own_rows(operator["outputs"][0], group)
                if layer is not None:
                    tensors = (frame.own_rows(tensor["operand"], group) for tensor in arguments[:5])
                    yield self._attend, (layer, *tensors, arguments[-1], out)
                else:
                    table, wanted, scale = arguments
                    ids = frame.window(wanted["operand"], group).reshape(-1)[: out.shape[0]]
                    yield self._embed, (frame.bindings[table["operand"]["value"]], ids, scale, out)

    def _compiled(self, program: Mapping[str, Any]) -> CompiledProgram:
        values, own = program["values"], self.device.kernels
        kernels = replace(own, direct={**own.direct, **DIRECT})
        operators: list[tuple[Mapping[str, Any], CompiledOperator | None]] = []
        for operator in program["operators"]:
            target = operator["target"]
            # Nothing has tested which of PyTorch's out variants write beside their output: no others are used.
            told = operator | {"copied": target not in kernels.direct}
            operators.append((operator, None if target in OWN else CompiledOperator(told, values, kernels)))
        return CompiledProgram(values, program["own"], operators)

    def _embed(self, table: str, ids: Tensor, scale: float, out: Tensor) -> None:
        """Rows of a table, times `scale`: rows of the head, if both are one and it is in memory, else read from
        disk.
        """
        if all(self.products.row(table, token, out[place]) for place, token in enumerate(ids.tolist())):
            if scale != 1.0:
                out.mul_(scale)
            return
        self.operators["tightfit.embed_rows"](table, ids, scale, out=(out,), store=self.store)

    def _attend(
        self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float, out: Tensor
    ) -> None:
        """Put keys and values of a group of tokens into a layer's cache, and let their queries attend to it."""
        scratch = self._place("attention")
        places = cache.add(k.shape[0])
        self.operators["tightfit.cache_tokens"](k, v, cos, sin, out=(*places, scratch))
        self.operators["tightfit.cached_attention"](
            q, *cache.filled, cos, sin, cache.window, cache.begin, scale, out=(out, scratch)
        )

    def _place(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self.device.tensor(*self.job.places[name])
        return self._tensors[name]
