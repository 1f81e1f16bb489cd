"""Random weights of a bare config, for sizing: the bytes are drawn in packed form, so that writing them costs little
more than the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from profiles.describe import EmbeddingFormat, describe
from profiles.sources import Source, SourceTensor
from profiles.store import VERSION, Entry

Q4_DEVIATION = (255 / 12) ** 0.5  # standard deviation of a code drawn evenly from 0..15: sqrt((16^2 - 1) / 12)
Q8_DEVIATION = (65535 / 12) ** 0.5  # of -128..127


def random_source(config: dict[str, Any], path: Path, *, embedding: EmbeddingFormat = "q4", seed: int = 0) -> Source:
    """A model of the config's sizes with weights of its `initializer_range` (0.02), drawn from `seed`."""
    entries = describe(config, embedding=embedding)
    deviation = float(config.get("initializer_range") or 0.02)
    text = json.dumps([VERSION, "random", config, embedding, seed], sort_keys=True)

    def tensors() -> Iterable[SourceTensor]:
        for entry in entries.values():
            yield SourceTensor(entry=entry, rows=_RandomRows(entry, config, deviation, seed))

    return Source(
        name=path.parent.name if path.name == "config.json" and path.parent.name else path.stem,
        kind="random",
        path=str(path),
        config=config,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        has_weights=False,
        entries=entries,
        tensors=tensors,
        note="random weights, for sizing only",
    )


class _RandomRows:
    """Rows drawn in order; the generator is seeded by tensor name, so that tensors do not depend on each other."""

    def __init__(self, entry: Entry, config: dict[str, Any], deviation: float, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}/{entry.name}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self.entry, self.deviation = entry, deviation
        centred = str(config.get("model_type", "")).startswith("gemma")  # RMSNorm multiplies by 1 + weight
        self.mean = 1.0 if "norm" in entry.name and not centred else 0.0

    def __call__(self, start: int, stop: int) -> Tensor:
        entry, rows = self.entry, stop - start
        if entry.format not in ("q4", "q8"):
            return torch.randn(rows, entry.columns, generator=self.generator) * self.deviation + self.mean
        size = rows * entry.row_bytes
        words = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None, generator=self.generator)
        packed = words.view(torch.uint8)[:size].view(rows * entry.columns // entry.group, -1)
        if entry.format == "q4":
            scale = torch.tensor([self.deviation / Q4_DEVIATION], dtype=torch.float16)
            packed[:, -4:-2] = scale.view(torch.uint8)
            packed[:, -2:] = (scale.float() * -7.5).half().view(torch.uint8)
        else:
            packed[:, :2] = torch.tensor([self.deviation / Q8_DEVIATION], dtype=torch.float16).view(torch.uint8)
        return packed.view(rows, entry.row_bytes)
