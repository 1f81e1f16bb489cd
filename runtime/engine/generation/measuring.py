"""Measures what a plan for answers has to know: the memory that the process holds beside its arena, and seconds.

It imports nothing that answering does not, since that would count as memory which answers need.

The process answers, for a while, with a plan that streams every matrix: the memory is what remains of its peak without
the arena. Then it answers with matrices that stand in for others of their shape and lie in memory, more of them than a
cache holds, so that nothing is read meanwhile: the seconds of unpacking, products and all else are those of these
passes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP, attention_cache_scratch
from tightfit.runtime.engine.cpu.pages import make_pages
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.generation.cached_decoder import CachedDecoder
from tightfit.runtime.engine.generation.job import Piece, Sampling
from tightfit.runtime.engine.generation.names import STALL, unpacked_key
from tightfit.runtime.engine.generation.sampling import Sampler
from tightfit.runtime.engine.generation.sizes import TAIL, TOKENS
from tightfit.runtime.engine.start.process import trim_heap

SMALL_BYTES = 1 << 30
"""of packed matrices, which are read for every pass; those of a larger model are passed over five times and not ten"""
WARM = 2
"""tokens of the answer that are not timed"""
APART_BYTES = 64 << 20
"""of memory in which matrices that stay unpacked are looked for, so that no cache holds them"""
REPEATS = 3
LENGTHS = (256, 1024, 2048, 4096, 8192, 16384)
"""keys with which the memory of attention is measured"""
SEEN = 1024
"""keys with which attention is timed"""
MOST_READ_BYTES = 256 << 20
PRESSED_BYTES = 8 << 20
"""by how much the memory in use exceeds that of the start while the peak is measured"""


def measure(decoder: CachedDecoder, start_bytes: int) -> dict[str, Any]:
    """Figures of the decoder's process, which has answered nothing yet; `start_bytes` was its peak when it had started.

    `base_bytes`: resident beside the arena at most, by the number of keys that attention has seen: the buffers in which
    matrix products arrange their operands grow with that. `rates`: seconds per element of a matrix, by the keys of
    `Products`, and for one row and a group of rows of activations also by `unpacked_key`. `token_seconds`,
    `group_seconds`: of all else in a pass of one token, and in that of a group. `key_seconds`: what a key in the cache
    adds to a token, in all layers. `read_seconds_per_byte`: of the disk; `read_core_seconds_per_byte`: of a core
    meanwhile.
    """
    every = decoder.device.raw(0, decoder.device.size)[::4096]
    every.copy_(every.clone())
    apart = make_pages(max(APART_BYTES, start_bytes - memory().resident + PRESSED_BYTES))
    pressed = torch.frombuffer(apart, dtype=torch.float32)
    pressed.fill_(0.5)
    _answer(decoder, 1)
    held = decoder.device.size + pressed.numel() * 4
    bases = {0: memory().peak - held}
    for seen in LENGTHS:
        if _attend(decoder, seen, pressed):
            bases[seen] = memory().peak - held
    rates = _unpacked_rates(decoder, pressed)
    decoder.return_to(0)
    read_ahead = decoder.stream
    decoder.take_from(StandIns(decoder, pressed.view(torch.uint8)))
    passes = _answer(decoder, TOKENS if _is_small(decoder) else WARM + 1)
    decoder.take_from(read_ahead)
    taken: dict[str, list[float]] = {}
    for spent, _ in passes:
        for key, (elements, seconds) in spent.items():
            if elements and key != STALL:
                taken.setdefault(key, []).append(seconds / elements)
    rates |= {key: _median(each) for key, each in taken.items()}
    found: dict[str, Any] = {"base_bytes": bases, "rates": rates}
    prompt, *tokens = passes
    found["group_seconds"] = _others(*prompt)
    found["token_seconds"] = _median([_others(*one) for one in tokens[WARM:]])
    del pressed
    apart.close()
    trim_heap()
    found["key_seconds"] = _key_seconds(decoder)
    found["read_seconds_per_byte"], found["read_core_seconds_per_byte"] = _read_rates(decoder)
    return found


class StandIns:
    """In the place of a decoder's stream: pieces that stand in for those of each pass and lie in memory, so that
    nothing is read.
    """

    def __init__(self, decoder: CachedDecoder, room: torch.Tensor) -> None:
        """All pieces of the decoder are streamed; `room` are bytes for those that stand in."""
        self._pieces, self._head = decoder.job.pieces, decoder.job.head
        self._bytes = _stand_ins(decoder, room)
        self._coming: Iterator[Piece] = iter(())

    def begin(self, *, with_head: bool) -> None:
        self._coming = (piece for piece in self._pieces if with_head or piece.matrix != self._head)

    def take(self) -> torch.Tensor:
        return self._bytes[next(self._coming).name]

    def release(self) -> None:
        """They stay where they are."""


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _is_small(decoder: CachedDecoder) -> bool:
    return sum(decoder.store.packed_bytes(piece.name) for piece in decoder.job.pieces) <= SMALL_BYTES


def _stand_ins(decoder: CachedDecoder, room: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the name of every piece the bytes of one of its format and shape, all of which lie in `room`, as many as fit
    and each shape at least once.
    """
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for piece in decoder.job.pieces:
        extent = decoder.store.extent(piece.name)
        entry = extent.entry
        kind = (entry.format, entry.group, entry.columns, extent.bytes, extent.skip, extent.row_bytes)
        kinds.setdefault(kind, []).append(piece.name)
    held: dict[tuple[Any, ...], list[torch.Tensor]] = {kind: [] for kind in kinds}
    end = 0
    for turn in range(max(map(len, kinds.values()))):  # one of each kind, then the next
        for kind, names in kinds.items():
            size = decoder.store.packed_bytes(names[0])
            if turn < len(names) and (not turn or end + size <= room.numel()):
                made = room[end : end + size] if end + size <= room.numel() else torch.empty(size, dtype=torch.uint8)
                decoder.store.read_into(names[turn], made)
                held[kind].append(made)
                end += size
    return {name: held[kind][at % len(held[kind])] for kind, names in kinds.items() for at, name in enumerate(names)}


def _answer(decoder: CachedDecoder, tokens: int) -> list[tuple[dict[str, list[float]], float]]:
    """What the passes of an answer of so many tokens spent, and their seconds: of the first group of the prompt and of
    each token. A small model is warmed up with the prompt before.
    """
    vocabulary = decoder.job.vocab
    ids = [token % vocabulary for token in range(GROUP + TAIL)]
    passes: list[tuple[dict[str, list[float]], float]] = []
    drawn = Sampling(temperature=1.0, top_k=vocabulary // 2, top_p=0.9) if decoder.job.sampled else Sampling()
    sampler = Sampler(drawn)
    if _is_small(decoder):
        sampler.choose(decoder.run(ids, lambda: None))
        decoder.return_to(0)
    for new in (ids[:GROUP], ids[GROUP:], *[[token % vocabulary] for token in range(tokens)]):
        decoder.products.spent = {}
        begun = time.perf_counter()
        sampler.choose(decoder.run(new, lambda: None))
        passes.append((decoder.products.spent, time.perf_counter() - begun))
        decoder.products.spent = None
    del passes[1]
    return passes


def _others(spent: dict[str, list[float]], seconds: float) -> float:
    return seconds - sum(taken for _, taken in spent.values())


def _unpacked_rates(decoder: CachedDecoder, room: torch.Tensor) -> dict[str, float]:
    """Seconds per element of products with matrices in `room`, by `unpacked_key`."""
    rates: dict[str, float] = {}
    products = decoder.products
    for columns in sorted({part.entry.columns for parts in products.parts.values() for part in parts}):
        matrix = room[: room.numel() // columns * columns].view(-1, columns)
        rows = products.rows_of_block(columns)
        for count in (1, GROUP):
            x, out = torch.full((count, columns), 0.5), torch.empty(count, rows)
            begun = time.perf_counter()
            for start in range(0, matrix.shape[0] - rows + 1, rows):
                torch.mm(x, matrix[start : start + rows].t(), out=out)
            rates[unpacked_key(count, columns)] = (time.perf_counter() - begun) / (
                matrix.shape[0] // rows * rows * columns
            )
    return rates


def _attend(decoder: CachedDecoder, seen: int, room: torch.Tensor) -> bool:
    """Let a group of tokens attend to so many keys, in tensors that lie in `room`; False: there is no room for them."""
    narrow = decoder.cache_dtype is not torch.float32
    widest = max(decoder.job.seen, key=lambda layer: (layer.heads * layer.width, layer.kv_heads))
    heads, kv_heads, width = widest.heads, widest.kv_heads, widest.width
    sizes = [kv_heads * (seen + 1) * width] * 2 + [GROUP * heads * width] * 2 + [GROUP * width // 2]
    sizes.append(attention_cache_scratch(heads, kv_heads, width, seen, narrow=narrow))
    if sum(sizes) > room.numel():
        return False
    keys, values, q, y, angles, scratch = room[: sum(sizes)].split(sizes)
    cache = [x.view(decoder.cache_dtype)[: x.numel()].view(kv_heads, seen + 1, width)[:, :seen] for x in (keys, values)]
    turned = angles.view(GROUP, width // 2)
    out = y.view(GROUP, -1), scratch
    decoder.operators["tightfit.cached_attention"](q.view(GROUP, -1), *cache, turned, turned, None, 0, 0.01, out=out)
    return True


def _key_seconds(decoder: CachedDecoder) -> float:
    """What each key adds to a token's attention in all layers."""
    kinds = Counter((layer.heads, layer.kv_heads, layer.width) for layer in decoder.job.seen)
    return sum(count * _key_seconds_of(decoder, *kind) for kind, count in kinds.items())


def _key_seconds_of(decoder: CachedDecoder, heads: int, kv_heads: int, width: int) -> float:
    """The same of one layer."""
    seconds = []
    for seen in (SEEN // 4, SEEN):
        keys, values = (torch.full((kv_heads, seen, width), 0.5).to(decoder.cache_dtype) for _ in range(2))
        q, angles = torch.full((1, heads * width), 0.5), torch.full((1, width // 2), 0.5)
        scratch = torch.empty(2 * GROUP * heads * width + heads * seen + kv_heads * seen * width)
        out = (torch.empty_like(q), scratch)
        times = []
        for _ in range(3 * REPEATS):
            begun = time.perf_counter()
            decoder.operators["tightfit.cached_attention"](q, keys, values, angles, angles, None, 0, 1.0, out=out)
            times.append(time.perf_counter() - begun)
        seconds.append(min(times))
    return max(0.0, seconds[1] - seconds[0]) / (SEEN - SEEN // 4)


def _read_rates(decoder: CachedDecoder) -> tuple[float, float]:
    """Seconds per byte of reading pieces one after the other, and those of a core: the medians of the pieces that were
    read.
    """
    store, device = decoder.store, decoder.device
    at, _ = decoder.job.staging
    rates: list[float] = []
    cores: list[float] = []
    read = 0
    for piece in decoder.job.pieces:
        size = store.packed_bytes(piece.name)
        if read + size > MOST_READ_BYTES:
            break
        read += size
        begun, own = time.perf_counter(), time.thread_time()
        store.read_into(piece.name, device.host(at, (size,), "uint8"))
        rates.append((time.perf_counter() - begun) / size)
        cores.append((time.thread_time() - own) / size)
    return _median(rates), _median(cores)
