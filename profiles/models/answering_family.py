"""A hand-written decoder as the step of an answer, traced from its own modules: every kind of layer once, in little
memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tightfit.profiles.models.answer_steps import MIXTURE, AnswerStep, AnswerSteps, refused_answers
from tightfit.profiles.models.decoder import (
    EMBEDDING,
    HEAD,
    Attention,
    DecoderLayer,
    Norm,
    embedding_scale,
    rotary_table,
)
from tightfit.profiles.models.decoder_config import DecoderShape, decoder_shape
from tightfit.profiles.models.decoder_module import Table
from tightfit.profiles.schema import Layer, Program
from tightfit.profiles.tracing.answer_ops import attend
from tightfit.profiles.tracing.parts import trace_part
from tightfit.profiles.tracing.torch_ops import embed_rows
from tightfit.runtime.engine.generation.names import IDS, POSITIONS


class CachedAttention(Attention):
    """Attention to a cache, which is not part of it."""

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        shape = self.shape
        return attend(q, k, v, cos, sin, shape.kv_heads, shape.head_dim, self.window, shape.attention_scale)  # type: ignore[no-any-return]


class Beginning(nn.Module):
    """forward(input_ids [1, t], positions [1, t]) -> hidden states [t, H], and cos and sin [t, D / 2] of every rotation
    in turn.
    """

    def __init__(self, shape: DecoderShape, rotations: list[tuple[float, bool]]) -> None:
        super().__init__()
        self.shape, self.rotations, self.scale = shape, rotations, embedding_scale(shape, torch.float32)
        self.embed_tokens = Table(shape.vocab, shape.hidden, torch.float32)

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        hidden = embed_rows(self.embed_tokens.weight, ids, self.scale)
        places = positions.reshape(-1).to(torch.float32)
        tables = [rotary_table(self.shape, places, *rotation) for rotation in self.rotations]
        return hidden, *(table for both in tables for table in both)


def family_steps(config: dict[str, Any], group: int) -> AnswerSteps:
    """The steps of one token and of `group` tokens of a config's decoder. Raises InputError as `decoder_shape` does,
    and for mixtures of experts.
    """
    shape = decoder_shape(config)
    if shape.mixtures:
        raise refused_answers(shape.family, MIXTURE)
    numbers: dict[str, list[float]] = {}
    return AnswerSteps(
        steps=[_step(shape, tokens, numbers) for tokens in (1, group)],
        numbers=numbers,
        head=f"{EMBEDDING if shape.tied else HEAD}.weight",
        bias=None,
        cap=None,
        vocab=shape.vocab,
    )


def _step(shape: DecoderShape, tokens: int, numbers: dict[str, list[float]]) -> AnswerStep:
    """The step of so many tokens; `numbers` gets the constants that it reads and no store holds."""
    rotations = sorted(set(shape.rotations))
    tables = [f"{what}.{number}" for number in range(len(rotations)) for what in ("cos", "sin")]
    programs: dict[Any, tuple[Program, dict[str, str], dict[str, Tensor]]] = {}
    """by the kind of a part, with the names of its parameters, and its constants"""
    layers: list[Layer] = []

    def add(name: str, kind: Any, given: list[str], made: list[str]) -> None:
        """Add a layer of a kind that is traced, with the names of what it is given and makes."""
        program, parameters, constants = programs[kind]
        bindings = {f"in{number}": one for number, one in enumerate(given)}
        bindings |= {value: f"{name}.{parameter}" for value, parameter in parameters.items()}
        bindings |= {f"out{number}": one for number, one in enumerate(made)}
        numbers.update((f"{name}.{constant}", tensor.flatten().tolist()) for constant, tensor in constants.items())
        layers.append(Layer(name=name, program=program.name, bindings=bindings))

    ids, positions = (torch.zeros(1, tokens, dtype=torch.int64) for _ in range(2))
    hidden, cos, sin = (torch.zeros(tokens, width) for width in (shape.hidden, *[shape.head_dim // 2] * 2))
    kinds: dict[Any, DecoderLayer] = {}
    with torch.device("meta"):
        first, last = Beginning(shape, rotations), Norm(shape.hidden, shape)
        for number, kind in enumerate(zip(shape.windows, shape.rotations, strict=True)):
            if kind not in kinds:
                kinds[kind] = DecoderLayer(shape, number, torch.float32, CachedAttention)
    programs["first"] = trace_part("first", first, [ids, positions])
    add("model", "first", [IDS, POSITIONS], ["hidden.0", *tables])
    for kind, layer in kinds.items():
        programs[kind] = trace_part(f"layer.{len(programs)}", layer, [hidden, cos, sin])
    for number, kind in enumerate(zip(shape.windows, shape.rotations, strict=True)):
        at = 2 * rotations.index(kind[1])
        add(f"model.layers.{number}", kind, [f"hidden.{number}", *tables[at : at + 2]], [f"hidden.{number + 1}"])
    programs["last"] = trace_part("last", last, [hidden])
    add("model.norm", "last", [f"hidden.{shape.layers}"], ["normed"])
    return AnswerStep(tokens=tokens, programs=[one for one, *_ in programs.values()], layers=layers, result="normed")
