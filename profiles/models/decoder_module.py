"""What all decoders have in common, whoever wrote their layers: pairs of LoRA, modules that are trained in full, and a
head whose loss is computed in slices of the vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightfit.profiles.models.answer_steps import MIXTURE
from tightfit.profiles.models.experts import Experts
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.projection import adapt, slice_matrices
from tightfit.profiles.models.router_loss import RouterLoss, RouterSums
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
from tightfit.profiles.tracing.torch_ops import capped_head_loss, embed_rows, head_loss, loss_of_tokens

HEAD_TOKENS = 2048
"""tokens whose losses are computed together where tiles are smaller: each part of the batch unpacks the head anew"""
CAPPED_SLICES = 4
"""How many times larger the slices of a head are whose logits are capped: each takes a dozen operators, not one."""
Pairs = tuple[()] | tuple[Tensor, str, float]
"""what a loss of pairs takes beside token losses and labels; nothing for the loss of tokens"""


class Table(nn.Module):
    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype), requires_grad=False)


class Rows(Table):
    """An embedding whose rows are gathered from the store, or that is trained: ids [...] -> [..., columns], times
    `scale`.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, scale: float) -> None:
        super().__init__(rows, columns, dtype)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return self.flat(ids).view(*ids.shape, self.weight.shape[1])

    def flat(self, ids: Tensor) -> Tensor:
        """The same [number of ids, columns]."""
        trained = trained_copy(self)
        return embed_rows(self.weight, ids, self.scale) if trained is None else trained(ids)  # type: ignore[no-any-return]


class DecoderModule(nn.Module):
    """forward(input_ids [batch, seq], labels [batch, seq], positions [batch, seq]) -> (loss float32 [], token losses
    float32 [batch * seq]); with a `preference` forward(input_ids, labels, positions, answers), with as many rows as two
    for each pair.

    labels[b, t] is the token that place t of a row has to predict, or -100 for none. positions[b, t], counted from 0,
    is that of the token in its sample, of which a row may hold several, one after the other; without it every row is
    one sample. Padding needs no mask: attention is causal and padded places carry no label. `answers` says which answer
    of a pair each place belongs to, and what the loss has to know of it
    (`tightfit.runtime.engine.cpu.preference.preference_loss`).

    A decoder sets `model`, its body, and what else is named here, and then calls `_train`.
    """

    model: Any
    embedding: Any
    """a `Rows`, or what stands for one"""
    head_name: str
    """"": the head is the embedding"""
    cap: float | None = None
    """of the logits, which are cap * tanh(logit / cap)"""
    whole_head: bool = False
    """whether all logits are in memory at once"""
    router_loss: RouterLoss | None = None
    preference: Preference | None = None
    rows_apart: str | None = None
    """Why samples cannot share rows; None: they can."""
    lora: dict[str, Any]
    """What a profile says of the adapter."""
    tables: dict[str, str]
    """Modules that are trained in full, and the tensors in the store that they start from."""
    trained_head: str = ""
    """Name of the head if it is trained in full."""

    def _train(
        self,
        lora: LoraConfig | None,
        savable: tuple[SavedModule, SavedModule],
        *,
        model: str,
        body: str,
        matrix_rows: int | None = None,
        padding: int | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        """Put in what `lora` has trained; nothing is with None. `savable` are the embedding and the head.

        `model` is its name in messages, `body` what adapters call its layers, `padding` the token whose embedding gets
        no gradient, `modules` what PEFT calls all modules. `matrix_rows` of a frozen matrix are read, unpacked and
        multiplied at a time, as `slice_matrices` has it. Raises InputError as `adapt` and `chosen` do.
        """
        self.lora, self.tables = {}, {}
        rows, width = self.head.weight.shape
        dtype = self.embedding.weight.dtype
        self.slice_rows = slice_rows(rows, width, dtype.itemsize)
        if self.cap is not None:
            self.slice_rows = min(rows, CAPPED_SLICES * self.slice_rows)
        if lora is None:
            return
        self.lora = adapt(self, lora, model, body)
        slice_matrices(self, matrix_rows)
        trained = chosen(lora.modules_to_save, savable, model, modules)
        self.tables = stored(trained)
        for table in trained:
            if table is savable[0]:
                size = self.embedding.weight.shape
                attach(self.embedding, TrainedEmbedding(size[0], size[1], dtype, self.embedding.scale, padding))
                continue
            self.trained_head = table.name
            if table.name not in self._modules:
                self.add_module(table.name, nn.Module())
            attach(self.get_submodule(table.name), TrainedHead(rows, width, self.cap))

    @property
    def head(self) -> Any:
        """The module whose weight makes the logits."""
        return self.get_submodule(self.head_name) if self.head_name else self.embedding

    def learn_rows(self, sample: Mapping[str, Tensor]) -> None:
        """Find out whether samples can share rows, from a forward on `sample`, under a FakeTensorMode, where it is not
        known.
        """

    def block_kinds(self) -> list[Hashable]:
        """For each block what its operators and their inputs depend on; none: each stands for itself."""
        return []

    def keep_blocks(self, numbers: Collection[int]) -> None:
        """Leave out all blocks but these, which keep their numbers."""

    def refuse_by_modules(self) -> str | None:
        """Why its modules cannot answer with a cache; None: nothing speaks against them."""
        return MIXTURE if any(isinstance(child, Experts) for child in self.modules()) else None

    @abstractmethod
    def through_layers(
        self, input_ids: Tensor, positions: Tensor | None, labels: Tensor
    ) -> tuple[list[Tensor], RouterSums | None]:
        """What the last layer makes of the tokens [tokens of a tile, H], tile by tile, and the sums of the routers'
        scores.
        """

    @abstractmethod
    def ended(self, hidden: Tensor) -> Tensor:
        """What the head multiplies [T, H], given what the last layer has made."""

    def forward(self, input_ids: Tensor, labels: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        positions, pairs = pairs_of(self.preference, others)
        tiles, sums = self.through_layers(input_ids, positions, labels)
        loss, token_losses = self._losses(tiles, labels, pairs)
        return loss if sums is None else loss + sums.loss(), token_losses

    def _losses(self, tiles: Sequence[Tensor], labels: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """(loss, token losses), given what the last layer made of the tiles."""
        parts = [tiles] if self.trained_head else _head_parts(tiles)
        if len(parts) == 1:
            return self._part_losses(parts[0], labels, pairs)
        losses, token_losses = [], []
        for part, own in zip(parts, labels.view(-1).split(labels.numel() // len(parts)), strict=True):
            # Labels of their own make the operators of all parts the same ones: a run then keeps those of one part.
            loss, part_losses = self._part_losses(part, own.clone(), pairs, counted=labels)
            losses.append(loss)
            token_losses.append(part_losses)
        return torch.stack(losses).sum(), torch.cat(token_losses)

    def _part_losses(
        self, tiles: Sequence[Tensor], labels: Tensor, pairs: Pairs, counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same of some of the tiles; `counted` are the labels of the whole batch, where these are of a part."""
        hidden = self.ended(joined(tiles))
        if self.trained_head:
            return trained_copy(self.get_submodule(self.trained_head))(hidden, labels, *pairs)  # type: ignore[misc, no-any-return]
        weight = self.head.weight
        if not self.whole_head and self.cap is not None:
            loss, token_losses, _ = capped_head_loss(hidden, weight, labels, self.slice_rows, self.cap, *pairs)
            return loss, token_losses
        if not self.whole_head:
            loss, token_losses, _ = head_loss(hidden, weight, labels, self.slice_rows, *pairs, counted=counted)
            return loss, token_losses
        logits = (self.head(hidden) if self.head_name else F.linear(hidden, weight)).float()
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        flat = labels.reshape(-1)
        token_losses = F.cross_entropy(logits, flat, ignore_index=-100, reduction="none")
        return loss_of_tokens(token_losses, labels, *pairs), token_losses


def pairs_of(preference: Preference | None, inputs: Sequence[Tensor]) -> tuple[Tensor | None, Pairs]:
    """(positions, if there are any; what the loss of pairs takes) of a decoder's inputs behind tokens and labels."""
    if preference is None:
        return (inputs[0] if inputs else None), ()
    *positions, answers = inputs
    return (positions[0] if positions else None), (answers, preference.loss, preference.beta)


def joined(tiles: Sequence[Tensor]) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(list(tiles))


def _head_parts(tiles: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The tiles, in equal parts of at most `HEAD_TOKENS` tokens, but of one tile at least; all in one where there is
    one tile.
    """
    together = max(1, min(HEAD_TOKENS // len(tiles[0]), len(tiles)))
    while len(tiles) % together:
        together -= 1
    return [tiles[start : start + together] for start in range(0, len(tiles), together)]


def without_values(module: nn.Module) -> nn.Module:
    """Replace parameters and buffers by empty ones, shared where they were: under a FakeTensorMode, fake ones."""
    empty_ones: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in empty_ones:
            bare = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            empty_ones[id(tensor)] = nn.Parameter(bare, requires_grad=tensor.requires_grad) if is_parameter else bare
        return empty_ones[id(tensor)]

    for child in module.modules():
        for held in (child._parameters, child._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = empty(tensor)  # type: ignore[assignment]
    return module
