"""What a step of a hand-written decoder needs beside its matrices, of any number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tightfit.planner.generation.places import Places
from tightfit.profiles.models.decoder_config import DecoderShape
from tightfit.runtime.engine.generation.job import Seen
from tightfit.runtime.engine.generation.names import HEAD
from tightfit.runtime.engine.weights.layout import Entry


@dataclass(frozen=True)
class WrittenForm:
    """See `tightfit.planner.generation.problem.DecoderForm`."""

    shape: DecoderShape

    @property
    def head(self) -> str:
        return HEAD[1] if self.shape.tied else HEAD[0]

    @property
    def vocab(self) -> int:
        return self.shape.vocab

    @property
    def seen(self) -> tuple[Seen, ...]:
        shape = self.shape
        return tuple(
            Seen(heads=shape.heads, kv_heads=shape.kv_heads, width=shape.head_dim, window=window)
            for window in shape.windows
        )

    def matrices(self) -> Iterator[str]:
        for layer in range(self.shape.layers):
            prefix = f"model.layers.{layer}."
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
                yield f"{prefix}{name}.weight"
            for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
                yield f"{prefix}{name}.weight"

    def constants(self, entries: Mapping[str, Entry]) -> Places:
        """Norms and biases."""
        return {name: (entry.shape, "float32") for name, entry in entries.items() if len(entry.shape) == 1}

    def activations(self, tokens: int, group: int) -> Places:
        shape = self.shape
        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        rotations = len(set(zip(shape.thetas, shape.scaled, strict=True)))
        sizes: dict[str, tuple[int, ...]] = {
            "hidden": (tokens, shape.hidden),
            "normed": (tokens, shape.hidden),
            "made": (tokens, shape.hidden),
            "rstd": (tokens, 1),
            "head_rstd": (group * shape.heads, 1),
            "q": (tokens, query),
            "k": (tokens, kv),
            "v": (tokens, kv),
            "attended": (tokens, query),
            "gate": (tokens, shape.intermediate),
            "up": (tokens, shape.intermediate),
            "positions": (tokens, 1),
            **{f"{what}.{key}": (tokens, shape.head_dim // 2) for key in range(rotations) for what in ("cos", "sin")},
        }
        return {name: (size, "float32") for name, size in sizes.items()}

    def job(self) -> dict[str, Any]:
        return {"shape": asdict(self.shape)}
