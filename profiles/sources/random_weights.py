"""Makes random weights for a bare config, for sizing: packed groups from a small random pool, written as fast as a
copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.models.decoder_config import initial_deviation
from tightfit.profiles.models.family import family_of
from tightfit.profiles.weights.describe import describe
from tightfit.profiles.weights.precision import DEFAULT, Precision, bits
from tightfit.profiles.weights.source import Source, SourceTensor, config_name, without_names
from tightfit.runtime.engine.weights.layout import ELEMENT_BYTES, VERSION, Entry, group_bytes

if TYPE_CHECKING:
    from torch import Tensor

Q4_DEVIATION = (255 / 12) ** 0.5  # standard deviation of a code drawn evenly from 0..15: sqrt((16^2 - 1) / 12)
Q8_DEVIATION = (65535 / 12) ** 0.5  # the same for a code drawn evenly from -128..127
PLAIN_GROUP = 32  # elements of a group of a matrix that is not quantised
POOL_GROUPS = 65537  # a prime, which no row length divides, so that rows repeat as late as possible


def random_source(config: dict[str, Any], path: Path, *, precision: Precision = DEFAULT, seed: int = 0) -> Source:
    """A model of the config's sizes with random weights, drawn from `seed`.

    Their standard deviation is the config's `initializer_range` (default 0.02). Raises InputError for an unusable
    config.
    """
    entries = describe(config, precision=precision)
    deviation = initial_deviation(config)
    sizes = dict.fromkeys(bits(entry) for entry in entries.values() if len(entry.shape) > 1)
    formats = {name: entry.format for name, entry in entries.items()}
    text = json.dumps([VERSION, "random", without_names(config), formats, seed], sort_keys=True)

    def tensors() -> Iterable[SourceTensor]:
        pools = _Pools(deviation, seed)
        for entry in entries.values():
            yield SourceTensor(entry=entry, rows=_RandomRows(entry, config, pools, seed))

    return Source(
        name=config_name(path),
        kind="random",
        path=str(path),
        config=config,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        has_weights=False,
        entries=entries,
        tensors=tensors,
        note=f"random weights, for sizing only: {', '.join(sizes)}",
        base=precision.base,
        embeddings=precision.embeddings,
    )


class _RandomRows:
    """Rows of one tensor.

    Vectors are drawn; matrices are windows on the pool of groups, with a start that depends on the name.
    """

    def __init__(self, entry: Entry, config: dict[str, Any], pools: _Pools, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}/{entry.name}".encode()).digest()
        self.start = int.from_bytes(digest[:8], "little") >> 1
        self.entry, self.pools = entry, pools
        centred = family_of(config).unit_offset
        self.mean = 1.0 if "norm" in entry.name and not centred else 0.0

    def __call__(self, start: int, stop: int) -> Tensor:
        import torch

        entry, rows = self.entry, stop - start
        group = entry.group or PLAIN_GROUP
        if len(entry.shape) == 1 or entry.columns % group:
            generator = torch.Generator().manual_seed(self.start + start)
            return torch.randn(rows, entry.columns, generator=generator) * self.pools.deviation + self.mean
        groups_per_row = entry.columns // group
        first, count = (self.start + start * groups_per_row) % POOL_GROUPS, rows * groups_per_row
        pool = self.pools.groups(entry.format, group, first + count)
        return pool[first : first + count].view(rows, entry.row_bytes)


class _Pools:
    """Random packed groups by format: `POOL_GROUPS` are drawn and repeated as often as needed, so that windows need no
    copy.
    """

    def __init__(self, deviation: float, seed: int) -> None:
        self.deviation, self.seed = deviation, seed
        self._groups: dict[tuple[str, int], Tensor] = {}

    def groups(self, kind: str, group: int, count: int) -> Tensor:
        """Random groups in a store format, uint8 [at least `count`, bytes per group]."""
        pool = self._groups.get((kind, group))
        if pool is None:
            pool = self._draw(kind, group)
        if len(pool) < count:
            pool = pool[:POOL_GROUPS].repeat(-(-count // POOL_GROUPS), 1)
        self._groups[kind, group] = pool
        return pool

    def _draw(self, kind: str, group: int) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        if kind in ELEMENT_BYTES:
            drawn = torch.randn(POOL_GROUPS, group, generator=generator) * self.deviation
            return drawn.to(getattr(torch, kind)).view(torch.uint8)
        packed = torch.randint(0, 256, (POOL_GROUPS, group_bytes(kind, group)), generator=generator, dtype=torch.uint8)
        if kind == "q4":
            scale = torch.tensor([self.deviation / Q4_DEVIATION], dtype=torch.float16)
            packed[:, -4:-2] = scale.view(torch.uint8)
            packed[:, -2:] = (scale.float() * -7.5).half().view(torch.uint8)
        else:
            packed[:, :2] = torch.tensor([self.deviation / Q8_DEVIATION], dtype=torch.float16).view(torch.uint8)
        return packed
