"""Decoder language models as one plain module, built from a Hugging Face config.

Families differ in a few switches (`tightfit.profiles.models.family`). Parameter names are Hugging Face's, so that
weights and adapters need no renaming. The base is frozen; projections carry LoRA pairs in float32
(`tightfit.profiles.models.lora`). Hidden states are flat, [batch * seq, hidden]: each projection is then one matrix
product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tightfit.profiles.models.decoder_config import DecoderShape
from tightfit.profiles.models.decoder_module import DecoderModule, Rows, Table
from tightfit.profiles.models.experts import Experts
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.projection import Projection
from tightfit.profiles.models.router_loss import RouterLoss, RouterSums, sums_of_batch
from tightfit.profiles.models.saved_modules import SavedModule, trained_copy
from tightfit.profiles.schema import Preference
from tightfit.profiles.tracing.tile_ops import rotary, tile_attention
from tightfit.profiles.tracing.torch_ops import attention, frozen_linear, gated, rms_norm
from tightfit.runtime.engine.cpu.rotary import rotary_frequencies
from tightfit.runtime.engine.training.adapter import BODY, peft_name

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class Norm(nn.Module):
    def __init__(self, width: int, shape: DecoderShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float32), requires_grad=False)
        self.eps, self.unit_offset = shape.eps, shape.unit_offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.unit_offset)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class EarlierTiles:
    """Keys, rotated, and values [tokens of a tile, kv_heads * head_dim] of the tiles of a row that a layer has
    computed.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class Attention(nn.Module):
    def __init__(self, shape: DecoderShape, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.window = shape, shape.windows[index]
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = Projection(shape.hidden, q, shape.attention_bias, dtype)
        self.k_proj = Projection(shape.hidden, kv, shape.attention_bias, dtype)
        self.v_proj = Projection(shape.hidden, kv, shape.attention_bias, dtype)
        self.o_proj = Projection(q, shape.hidden, shape.output_bias, dtype)
        if shape.head_norm:
            self.q_norm, self.k_norm = Norm(shape.head_dim, shape), Norm(shape.head_dim, shape)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        before: EarlierTiles | None = None,
    ) -> Tensor:
        shape = self.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if shape.head_norm:
            q = self.q_norm(q.view(-1, shape.head_dim)).view(q.shape)
            k = self.k_norm(k.view(-1, shape.head_dim)).view(k.shape)
        if before is not None:
            return self.o_proj(self._attended_along(q, k, v, cos, sin, positions, before))  # type: ignore[no-any-return]
        return self.o_proj(self.attended(q, k, v, cos, sin, mask, positions))  # type: ignore[no-any-return]

    def _attended_along(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, before: EarlierTiles
    ) -> Tensor:
        """A tile's queries attend to the keys of the tiles `before` it in the row and to its own, which join these."""
        shape = self.shape
        if positions is None:
            start = len(before.keys) * len(q)
            cos, sin = cos[start : start + len(q)], sin[start : start + len(q)]
        before.keys.append(rotary(k, cos, sin, positions, shape.kv_heads))
        before.values.append(v)
        queries = rotary(q, cos, sin, positions, shape.heads)
        sizes = shape.heads, shape.kv_heads, shape.attention_scale, self.window or 0
        y, *_ = tile_attention(queries, before.keys, before.values, positions, *sizes)
        return y  # type: ignore[no-any-return]

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        shape = self.shape
        y, *_ = attention(q, k, v, cos, sin, mask, positions, shape.heads, shape.kv_heads, shape.attention_scale)
        return y  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = shape.activation
        self.gate_proj = Projection(shape.hidden, shape.intermediate, shape.mlp_bias, dtype)
        self.up_proj = Projection(shape.hidden, shape.intermediate, shape.mlp_bias, dtype)
        self.down_proj = Projection(shape.intermediate, shape.hidden, shape.mlp_bias, dtype)
        if shape.mixtures:  # PEFT would take their pairs for those of experts
            self.gate_proj.adaptable = self.up_proj.adaptable = self.down_proj.adaptable = False

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))  # type: ignore[no-any-return]


class Mixture(nn.Module):
    """Experts, of which the softmax of a router's scores chooses some for each row."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.chosen, self.shares = shape.chosen, shape.shares
        self.gate = Table(shape.experts, shape.hidden, dtype)
        self.experts = Experts(shape.experts, shape.hidden, shape.expert_width, shape.activation, dtype)

    def forward(self, x: Tensor, routed: Callable[[Tensor], None] | None = None) -> Tensor:
        """`routed` is called with the router's scores [T, experts]."""
        scores = frozen_linear(x, self.gate.weight, None, len(self.gate.weight))
        if routed is not None:
            routed(scores)
        weights, index = torch.topk(torch.softmax(scores, dim=-1, dtype=torch.float32), self.chosen, dim=-1)
        if self.shares:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(x, index, weights)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    def __init__(self, shape: DecoderShape, index: int, dtype: torch.dtype, kind: type[Attention] = Attention) -> None:
        super().__init__()
        self.post_norms = shape.post_norms
        self.self_attn = kind(shape, index, dtype)
        self.mlp = Mixture(shape, dtype) if shape.is_mixture(index) else Mlp(shape, dtype)
        self.input_layernorm = Norm(shape.hidden, shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape)
        if shape.post_norms:
            self.pre_feedforward_layernorm = Norm(shape.hidden, shape)
            self.post_feedforward_layernorm = Norm(shape.hidden, shape)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        before: EarlierTiles | None = None,
        routed: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, positions, before)
        told = (routed,) if isinstance(self.mlp, Mixture) else ()
        if not self.post_norms:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x), *told)  # type: ignore[no-any-return]
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), *told))  # type: ignore[no-any-return]


class Body(nn.Module):
    def __init__(self, shape: DecoderShape, dtype: torch.dtype, attention: type[Attention]) -> None:
        super().__init__()
        self.embed_tokens = Rows(shape.vocab, shape.hidden, dtype, embedding_scale(shape, dtype))
        self.layers = nn.ModuleList(DecoderLayer(shape, i, dtype, attention) for i in range(shape.layers))
        self.norm = Norm(shape.hidden, shape)


class Decoder(DecoderModule):
    """A *tile*, of so many tokens, goes through a layer at a time, and all tiles do before the next layer begins; None:
    all tokens at once. It is several rows of the batch, or a part of a row, of whose tiles each attends to the keys and
    values of those before it. `matrix_rows` of a frozen matrix are read, unpacked and multiplied at a time, as
    `slice_matrices` has it. Without `lora` nothing is trained; `attention` is how queries attend.
    """

    def __init__(
        self,
        shape: DecoderShape,
        *,
        dtype: torch.dtype,
        lora: LoraConfig | None,
        body: str = BODY,
        preference: Preference | None = None,
        tile: int | None = None,
        matrix_rows: int | None = None,
        attention: type[Attention] = Attention,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.tile = tile
        self.preference = preference
        self.model = Body(shape, dtype, attention)
        self.head_name = "" if shape.tied else HEAD
        if not shape.tied:
            self.lm_head = Table(shape.vocab, shape.hidden, dtype)
        coefficient, layers = shape.router_loss, sum(shape.mixtures)
        self.router_loss = None if not coefficient or not layers else RouterLoss(shape.chosen, coefficient, layers)
        starts = EMBEDDING, EMBEDDING if shape.tied else HEAD
        embedding, head = (
            SavedModule(name=name, called=peft_name(name, body), weight=f"{start}.weight")
            for name, start in zip((EMBEDDING, HEAD), starts)
        )
        self._train(
            lora, (embedding, head), model="the model", body=body, matrix_rows=matrix_rows, padding=shape.padding
        )

    @property
    def embedding(self) -> Rows:
        return self.model.embed_tokens  # type: ignore[no-any-return]

    def ended(self, hidden: Tensor) -> Tensor:
        return self.model.norm(hidden)  # type: ignore[no-any-return]

    def through_layers(
        self, input_ids: Tensor, positions: Tensor | None, labels: Tensor
    ) -> tuple[list[Tensor], RouterSums | None]:
        shape, seq = self.shape, input_ids.shape[1]
        tiles = self._embedded(input_ids)
        sums = sums_of_batch(self.router_loss, labels, len(tiles))
        places = torch.arange(seq, dtype=torch.float32)
        tables = {rotation: rotary_table(shape, places, *rotation) for rotation in sorted(set(shape.rotations))}
        along_rows = len(tiles[0]) < seq
        longest = 0 if along_rows else seq
        masks = {w: window_mask(seq, w) for w in sorted({w for w in shape.windows if w is not None and w < longest})}
        positions_of_tiles: Sequence[Tensor | None] = [None] * len(tiles)
        if positions is not None:
            rows, columns = max(1, len(tiles[0]) // seq), min(len(tiles[0]), seq)
            positions_of_tiles = [part for block in positions.split(rows) for part in block.split(columns, dim=1)]
        routed = [None if sums is None else partial(sums.add, tile=number) for number in range(len(tiles))]
        for number, layer in self.model.layers.named_children():
            window, rotation = shape.windows[int(number)], shape.rotations[int(number)]
            mask = masks.get(window) if window is not None else None
            outputs: list[Tensor] = []
            before: EarlierTiles | None = None
            for tile, positions_of_tile, routed_of_tile in zip(tiles, positions_of_tiles, routed, strict=True):
                if along_rows and len(outputs) * len(tile) % seq == 0:  # a row begins
                    before = EarlierTiles()
                outputs.append(layer(tile, *tables[rotation], mask, positions_of_tile, before, routed_of_tile))
            tiles = outputs
        return tiles, sums

    def block_kinds(self) -> list[Hashable]:
        """For each block what its operators and their inputs depend on: whether it is the first one, its tensors,
        pairs, window and rotation, and whether a gradient of what it reads is wanted.
        """
        wanted = any(parameter.requires_grad for parameter in self.model.embed_tokens.parameters())
        kinds: list[Hashable] = []
        layers = zip(self.model.layers, self.shape.windows, self.shape.rotations, strict=True)
        for number, (block, window, rotation) in enumerate(layers):
            tensors = [
                (name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in block.named_parameters()
            ]
            pairs: list[Hashable] = [
                (child.pair, child.site) for child in block.modules() if isinstance(child, Projection)
            ]
            pairs += [child.pair for child in block.modules() if isinstance(child, Experts)]
            # Behind a layer without experts the sums of a router come from further back than the layer before.
            alone = number if self.router_loss and not all(self.shape.mixtures) else None
            kinds.append((not kinds, wanted, window, rotation, tuple(tensors), tuple(pairs), alone))
            wanted = wanted or any(tensor.requires_grad for tensor in block.parameters())
        return kinds

    def keep_blocks(self, numbers: Collection[int]) -> None:
        """Leave out all blocks but these, which keep their numbers."""
        for number in set(range(self.shape.layers)) - set(numbers):
            del self.model.layers._modules[str(number)]

    def _embedded(self, ids: Tensor) -> list[Tensor]:
        """The embeddings [tokens of a tile, hidden] of each tile."""
        size = self.tile or ids.numel()
        if trained_copy(self.embedding) is not None:
            return list(self.embedding.flat(ids).split(size))
        parts = [ids] if size == ids.numel() else ids.view(-1).split(size)
        return [self.embedding.flat(part) for part in parts]


def embedding_scale(shape: DecoderShape, dtype: torch.dtype) -> float:
    """What embeddings are multiplied by, rounded to the type of hidden states."""
    scale = shape.embed_scale
    return float(torch.tensor(scale, dtype=dtype, device="cpu")) if scale != 1.0 else 1.0


def rotary_table(shape: DecoderShape, positions: Tensor, theta: float, scaled: bool) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [t, head_dim / 2] of the positions, float32 [t]."""
    frequencies = rotary_frequencies(shape.head_dim, theta, dict(shape.rope_scaling) if scaled else {})
    angles = positions[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def window_mask(seq: int, window: int) -> Tensor:
    """Additive causal mask float32 [seq, seq] that lets each position see itself and window - 1 positions before it."""
    positions = torch.arange(seq)
    distance = positions[:, None] - positions[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(seq, seq).masked_fill(hidden, -math.inf)
