"""Decoder language models as one plain module, built from a Hugging Face config.

Families differ in a few switches (`tightfit.profiles.models.family`). Parameter names are Hugging Face's, so that
weights and adapters need no renaming. The base is frozen; projections carry LoRA pairs in float32
(`tightfit.profiles.models.lora`). Hidden states are flat, [batch * seq, hidden]: each projection is then one matrix
product.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.profiles.models.decoder_config import DecoderShape
from tightfit.profiles.models.experts import Experts
from tightfit.profiles.models.factor import Factor
from tightfit.profiles.models.lora import OF_EXPERTS, LoraConfig, Pair
from tightfit.profiles.models.router_loss import RouterLoss, RouterSums, sums_of_batch
from tightfit.profiles.models.saved_modules import (
    SavedModule,
    TrainedEmbedding,
    TrainedHead,
    attach,
    chosen,
    slice_rows,
    stored,
    trained_copy,
)
from tightfit.profiles.schema import Preference
from tightfit.profiles.tracing.dora_ops import dora_norm, dora_scale
from tightfit.profiles.tracing.dropout_ops import dropout, dropout_lora_linear
from tightfit.profiles.tracing.tile_ops import rotary, tile_attention
from tightfit.profiles.tracing.torch_ops import (
    attention,
    embed_rows,
    frozen_linear,
    gated,
    head_loss,
    lora_linear,
    rms_norm,
)
from tightfit.runtime.engine.cpu.rotary import rotary_frequencies
from tightfit.runtime.engine.training.adapter import BODY, peft_name

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


HEAD_TOKENS = 2048
"""tokens whose losses are computed together where tiles are smaller: each part of the batch unpacks the head anew"""
MATRIX_BYTES = 64 << 20
"""largest frozen matrix, unpacked, that is read, unpacked and multiplied as a whole; of larger ones, slices are"""
Pairs = tuple[()] | tuple[Tensor, str, float]
"""what a loss of pairs takes beside token losses and labels; nothing for the loss of tokens"""


def pairs_of(preference: Preference | None, inputs: Sequence[Tensor]) -> tuple[Tensor | None, Pairs]:
    """(positions, if there are any; what the loss of pairs takes) of a decoder's inputs behind tokens and labels."""
    if preference is None:
        return (inputs[0] if inputs else None), ()
    *positions, answers = inputs
    return (positions[0] if positions else None), (answers, preference.loss, preference.beta)


class Norm(nn.Module):
    def __init__(self, width: int, shape: DecoderShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float32), requires_grad=False)
        self.eps, self.unit_offset = shape.eps, shape.unit_offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.unit_offset)[0]  # type: ignore[no-any-return]


class Magnitude(nn.Module):
    """The lengths of a projection's rows, which DoRA trains, float32."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, dtype=torch.float32))


class Projection(nn.Module):
    """Frozen x @ W.T (+ bias) plus, where it has a pair, the trained scale * x @ A.T @ B.T; with DoRA the rows of W +
    scale * B @ A are given trained lengths.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float32), requires_grad=False) if bias else None
        self.adaptable = True
        """Whether it may get a pair."""
        self.pair: Pair | None = None
        self.site = 0
        """Number among the projections of its layer, by which their dropout masks differ."""
        self.slice_rows = outputs
        """Rows of the frozen matrix that are read, unpacked and multiplied at a time."""

    def adapt(self, pair: Pair) -> None:
        """Give it a LoRA pair."""
        outputs, inputs = self.weight.shape
        self.pair = pair
        self.lora_A, self.lora_B = Factor(pair.rank, inputs), Factor(outputs, pair.rank)
        if pair.dora:
            self.lora_magnitude_vector = Magnitude(outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.pair is None:
            return frozen_linear(x, self.weight, self.bias, self.slice_rows)  # type: ignore[no-any-return]
        factors = self.lora_A.weight, self.lora_B.weight
        if self.pair.dora:
            return self._of_magnitude(x, self.pair)
        if self.pair.dropout:
            settings = self.pair.scale, self.pair.dropout, self.site
            return dropout_lora_linear(x, self.weight, self.bias, *factors, *settings)[0]  # type: ignore[no-any-return]
        return lora_linear(x, self.weight, self.bias, *factors, self.pair.scale, self.slice_rows)[0]  # type: ignore[no-any-return]

    def _of_magnitude(self, x: Tensor, pair: Pair) -> Tensor:
        """With dropout, as in PEFT, all that is scaled reads what is left of the input, the frozen weight as well, and
        only what W x lacks then is not scaled.
        """
        left = dropped(x, pair, self.site)
        factors = self.lora_A.weight, self.lora_B.weight
        z, _ = lora_linear(left, self.weight, None, *factors, pair.scale, self.slice_rows)
        # Right after the product, while the unpacked weight is there.
        norm, _ = dora_norm(self.weight, *factors, pair.scale)
        magnitude = self.lora_magnitude_vector.weight
        if not pair.dropout:
            return dora_scale(z, magnitude, norm, self.bias)[0]  # type: ignore[no-any-return]
        scaled, _ = dora_scale(z, magnitude, norm, None)
        return scaled + frozen_linear(x - left, self.weight, self.bias, self.slice_rows)  # type: ignore[no-any-return]


def dropped(x: Tensor, pair: Pair, site: int) -> Tensor:
    """The pair's input x [T, I] after dropout, as a tensor of its own. Without dropout x itself."""
    return dropout(x, pair.dropout, site) if pair.dropout else x


def adapt(module: nn.Module, lora: LoraConfig, model: str, body: str = BODY) -> dict[str, Any]:
    """Give pairs to the projections of a decoder that are chosen; what a profile says of the adapter.

    `model` is its name in messages, `body` what adapters call its layers. Raises InputError as `LoraConfig.chosen`
    does.
    """
    found = {
        peft_name(name, body): child
        for name, child in module.named_modules()
        if isinstance(child, Projection) and child.adaptable
    }
    for child, site in zip(found.values(), _sites(found)):
        child.site = site
    experts = {
        peft_name(name, body): child
        for name, child in module.named_modules()
        if isinstance(child, Experts) and child.adaptable
    }
    chosen_experts = lora.chosen_experts(list(experts), model)
    parameters = [f"{name}.{parameter}" for name in chosen_experts for parameter in OF_EXPERTS]
    chosen = lora.chosen(list(found), model, parameters)
    for name, pair in chosen.items():
        found[name].adapt(pair)
    for name, pair in chosen_experts.items():
        experts[name].adapt(pair)
    return lora.as_json(list(found), list(chosen), body, list(chosen_experts))


def slice_matrices(module: nn.Module, rows: int | None) -> None:
    """Have the projections of a decoder, which has its pairs, read, unpack and multiply so many rows of their frozen
    matrices at a time; None: as many as `MATRIX_BYTES` hold. Those with DoRA or dropout take all rows at once, and
    mixtures whole experts.
    """
    for child in module.modules():
        if isinstance(child, Experts):
            child.slice(rows, MATRIX_BYTES)
        if not isinstance(child, Projection) or not child.adaptable:
            continue
        if child.pair is not None and (child.pair.dora or child.pair.dropout):
            continue
        outputs, inputs = child.weight.shape
        itemsize = child.weight.dtype.itemsize
        child.slice_rows = min(outputs, rows or slice_rows(outputs, inputs, itemsize, MATRIX_BYTES))


def _sites(names: Iterable[str]) -> Iterator[int]:
    """Of each projection its number among those of its layer, from 0: the same in all layers that are alike."""
    counts: Counter[str] = Counter()
    for name in names:
        layer = re.match(r".*?\.\d+(?=\.)", name)
        key = layer[0] if layer else ""
        yield counts[key]
        counts[key] += 1


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


class Table(nn.Module):
    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype), requires_grad=False)


class Body(nn.Module):
    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Table(shape.vocab, shape.hidden, dtype)
        self.layers = nn.ModuleList(DecoderLayer(shape, i, dtype) for i in range(shape.layers))
        self.norm = Norm(shape.hidden, shape)


class Decoder(nn.Module):
    """forward(input_ids [batch, seq], labels [batch, seq], positions [batch, seq]) -> (loss float32 [], token losses
    float32 [batch * seq]); with a `preference` forward(input_ids, labels, positions, answers), with as many rows as two
    for each pair.

    labels[b, t] is the token that place t of a row has to predict, or -100 for none. positions[b, t], counted from 0,
    is that of the token in its sample, of which a row may hold several, one after the other; without it every row is
    one sample. Padding needs no mask: attention is causal and padded places carry no label. `answers` says which answer
    of a pair each place belongs to, and what the loss has to know of it
    (`tightfit.runtime.engine.cpu.preference.preference_loss`). A *tile*, of so many tokens, goes through a layer at a
    time, and all tiles do before the next layer begins; None: all tokens at once. It is several rows of the batch, or a
    part of a row, of whose tiles each attends to the keys and values of those before it. `matrix_rows` of a frozen
    matrix are read, unpacked and multiplied at a time, as `slice_matrices` has it.
    """

    def __init__(
        self,
        shape: DecoderShape,
        *,
        dtype: torch.dtype,
        lora: LoraConfig,
        body: str = BODY,
        preference: Preference | None = None,
        tile: int | None = None,
        matrix_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.tile = tile
        self.dtype = dtype
        self.model = Body(shape, dtype)
        if not shape.tied:
            self.lm_head = Table(shape.vocab, shape.hidden, dtype)
        self.lora = adapt(self, lora, "the model", body)
        """What a profile says of the adapter."""
        slice_matrices(self, matrix_rows)
        self.tables = self._save(lora.modules_to_save, body)
        """Modules that are trained in full, and the tensors in the store that they start from."""
        self.slice_rows = slice_rows(shape.vocab, shape.hidden, dtype.itemsize)
        coefficient, layers = shape.router_loss, sum(shape.mixtures)
        self.router_loss = None if not coefficient or not layers else RouterLoss(shape.chosen, coefficient, layers)
        self.preference = preference
        self.rows_apart: str | None = None
        """Why samples cannot share rows; None: they can."""

    def forward(self, input_ids: Tensor, labels: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        positions, pairs = pairs_of(self.preference, others)
        embedded = self._embedded(input_ids)
        sums = sums_of_batch(self.router_loss, labels, len(embedded))
        tiles = self._through_layers(embedded, input_ids, positions, sums)
        loss, token_losses = self._losses(tiles, labels, pairs)
        return loss if sums is None else loss + sums.loss(), token_losses

    def _losses(self, tiles: Sequence[Tensor], labels: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """(loss, token losses), given what the last layer made of the tiles."""
        trained = trained_copy(self.lm_head) if HEAD in self._modules else None
        if trained is not None:
            return trained(self.model.norm(_joined(tiles)), labels, *pairs)  # type: ignore[no-any-return]
        head = self.model.embed_tokens if self.shape.tied else self.lm_head
        parts = _head_parts(tiles)
        counted = labels if len(parts) > 1 else None
        losses, token_losses = [], []
        for part, own in zip(parts, labels.view(-1).split(labels.numel() // len(parts)), strict=True):
            hidden = self.model.norm(_joined(part))
            # Labels of their own make the operators of all parts the same ones: a run then keeps those of one part.
            own_labels = labels if counted is None else own.clone()
            made = head_loss(hidden, head.weight, own_labels, self.slice_rows, *pairs, counted=counted)
            losses.append(made[0])
            token_losses.append(made[1])
        return losses[0] if counted is None else torch.stack(losses).sum(), _joined(token_losses)

    def _through_layers(
        self, tiles: list[Tensor], input_ids: Tensor, positions: Tensor | None, sums: RouterSums | None
    ) -> list[Tensor]:
        """What the last layer makes of the embedded tiles; `sums` get the scores of the routers."""
        shape, seq = self.shape, input_ids.shape[1]
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
            made: list[Tensor] = []
            before: EarlierTiles | None = None
            for tile, positions_of_tile, routed_of_tile in zip(tiles, positions_of_tiles, routed, strict=True):
                if along_rows and len(made) * len(tile) % seq == 0:  # a row begins
                    before = EarlierTiles()
                made.append(layer(tile, *tables[rotation], mask, positions_of_tile, before, routed_of_tile))
            tiles = made
        return tiles

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
        trained = trained_copy(self.model.embed_tokens)
        if trained is not None:
            return list(trained(ids).split(size))
        scale = embedding_scale(self.shape, self.dtype)
        parts = [ids] if size == ids.numel() else ids.view(-1).split(size)
        return [embed_rows(self.model.embed_tokens.weight, part, scale) for part in parts]

    def _save(self, wanted: Sequence[str], body: str) -> dict[str, str]:
        """Put trained copies into the modules that are to be trained in full; what a profile says of them."""
        shape = self.shape
        starts = {EMBEDDING: EMBEDDING, HEAD: EMBEDDING if shape.tied else HEAD}
        tables = [
            SavedModule(name=name, called=peft_name(name, body), weight=f"{start}.weight")
            for name, start in starts.items()
        ]
        found = chosen(wanted, tables, "the model")
        for table in found:
            if table.name == EMBEDDING:
                scale = embedding_scale(shape, self.dtype)
                made = TrainedEmbedding(shape.vocab, shape.hidden, self.dtype, scale, shape.padding)
                attach(self.model.embed_tokens, made)
                continue
            if shape.tied:
                self.add_module(HEAD, nn.Module())
            attach(self.get_submodule(HEAD), TrainedHead(shape.vocab, shape.hidden))
        return stored(found)


def _joined(tiles: Sequence[Tensor]) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(list(tiles))


def _head_parts(tiles: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The tiles, in equal parts of at most `HEAD_TOKENS` tokens, but of one tile at least; all in one where there is
    one tile.
    """
    together = max(1, min(HEAD_TOKENS // len(tiles[0]), len(tiles)))
    while len(tiles) % together:
        together -= 1
    return [tiles[start : start + together] for start in range(0, len(tiles), together)]


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
